// Split files: three parts read as one, and parts that don't belong together.
#include <filesystem>

#include "gguf/gguf_file.h"
#include "gguf_image.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

constexpr uint32_t kF32 = 0;

// Three parts with a tensor each, the second with another alignment, and a folder for them.
struct Parts {
    Parts() {
        for (uint16_t i = 0; i < 3; ++i) {
            GgufImage& part = parts[i];
            part.alignment = i == 1 ? 64 : 32;
            part.key("split.no", U16, Bytes().u16(i)).key("split.count", U16, Bytes().u16(3));
            part.key("split.tensors.count", I32, Bytes().u32(3));
            part.key("general.alignment", static_cast<uint32_t>(part.alignment));
            part.tensor_at_end(format("tensor-%d", i), {8}, kF32, 32);
        }
        parts[0].key("general.architecture", "toy");
    }

    std::string name(int i) const { return format("model-%05d-of-00003.gguf", i + 1); }
    std::string write() {
        for (int i = 0; i < 3; ++i) folder.write(name(i), parts[i].bytes());
        return folder.path() + "/" + name(0);
    }

    GgufImage parts[3];
    TemporaryFolder folder;
};

}  // namespace

TEST_CASE("parts are read as one file") {
    Parts parts;
    parts.parts[2].key("from.a.later.part", 7u);
    const auto file = GgufFile::open_all_parts(parts.write());
    REQUIRE(file->n_parts() == 3);
    REQUIRE(file->tensors().size() == 3);
    for (size_t i = 0; i < 3; ++i) {
        const TensorInfo& tensor = file->tensors()[i];
        CHECK(tensor.part == i);
        CHECK(tensor.offset % file->part(i).alignment() == 0);
        CHECK(file->tensor_data(tensor) == file->part(i).data() + tensor.offset);
    }
    CHECK(file->find("general.architecture") != nullptr);
    CHECK(file->find("from.a.later.part") != nullptr);
    for (const char* key : {"split.no", "split.count", "split.tensors.count"}) CHECK(!file->find(key));
    CHECK(file->n_bytes_of_all_parts() ==
          parts.parts[0].bytes().size() + parts.parts[1].bytes().size() + parts.parts[2].bytes().size());
}

TEST_CASE("a file of one part") {
    GgufImage image;
    image.key("split.count", 1u).tensor_at_end("a", {8}, kF32, 32);
    const TemporaryFolder folder;
    CHECK(GgufFile::open_all_parts(folder.write("any name.gguf", image.bytes()))->n_parts() == 1);
}

TEST_CASE("parts that are missing or have the wrong name") {
    Parts parts;
    const std::string first = parts.write();
    CHECK_ERROR(GgufFile::open_all_parts(parts.folder.path() + "/" + parts.name(1)), format, parts.name(0));
    const std::string renamed = parts.folder.write("other.gguf", parts.parts[0].bytes());
    CHECK_ERROR(GgufFile::open_all_parts(renamed), format, "-00001-of-00003.gguf");
    std::filesystem::remove(parts.folder.path() + "/" + parts.name(2));
    CHECK_ERROR(GgufFile::open_all_parts(first), format, parts.name(2));
}

TEST_CASE("parts that don't belong together") {
    Parts parts;
    SUBCASE("numbered otherwise than named") {
        std::swap(parts.parts[1], parts.parts[2]);
        CHECK_ERROR(GgufFile::open_all_parts(parts.write()), format, "split.no");
    }
    SUBCASE("of another count") {
        parts.parts[2].keys[1] = Bytes().text("split.count").u32(U16).u16(4);
        CHECK_ERROR(GgufFile::open_all_parts(parts.write()), format, "split.count");
    }
    SUBCASE("without a number") {
        parts.parts[1].keys.erase(parts.parts[1].keys.begin());
        CHECK_ERROR(GgufFile::open_all_parts(parts.write()), format, "split.no");
    }
    SUBCASE("numbered beyond the count") {
        parts.parts[0].keys[0] = Bytes().text("split.no").u32(U16).u16(3);
        CHECK_ERROR(GgufFile::open_all_parts(parts.write()), format, "split.no");
    }
    SUBCASE("a tensor less than promised") {
        for (GgufImage& part : parts.parts)
            part.keys[2] = Bytes().text("split.tensors.count").u32(I32).u32(4);
        CHECK_ERROR(GgufFile::open_all_parts(parts.write()), format, "split.tensors.count");
    }
    SUBCASE("the same tensor twice") {
        parts.parts[2].tensors[0] = parts.parts[0].tensors[0];
        CHECK_ERROR(GgufFile::open_all_parts(parts.write()), format, "tensor-0");
    }
    SUBCASE("a key of two values") {
        parts.parts[1].key("general.architecture", "another");
        CHECK_ERROR(GgufFile::open_all_parts(parts.write()), format, "general.architecture");
    }
    SUBCASE("a damaged one") {
        parts.parts[1].version = 9;
        CHECK_ERROR(GgufFile::open_all_parts(parts.write()), format, parts.name(1));
    }
}

}  // namespace testing
}  // namespace pydiffusion
