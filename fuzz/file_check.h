// What must be true of a file that the file layer has opened.
#pragma once

#include "gguf/gguf_file.h"

// Not assert(), which a release build would drop.
void require(bool ok);

// Every key is found, every tensor lies inside its part, and no two of a part overlap. Aborts otherwise.
void check_file(const pydiffusion::GgufFile& file);
