#include "backend/cuda/step_kernels.cuh"
#include "support.h"
