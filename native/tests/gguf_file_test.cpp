// Files that are read as they were written, and one test for each way to be broken.
#include "gguf/gguf_file.h"

#include <filesystem>

#include "gguf_image.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

constexpr uint32_t kF32 = 0, kF16 = 1, kQ8_0 = 8;  // numbers of tensor types in a file

struct Opened {
    explicit Opened(const std::vector<uint8_t>& bytes) : file(folder.write("a.gguf", bytes)) {}
    TemporaryFolder folder;
    GgufFile file;
};

void open(const GgufImage& image) { Opened(image.bytes()); }

// One F32 tensor of 8 and one of 2 x 4.
GgufImage two_tensors() {
    GgufImage image;
    image.key("general.architecture", "toy");
    image.tensor_at_end("a", {8}, kF32, 32).tensor_at_end("b", {4, 2}, kF32, 32);
    return image;
}

}  // namespace

TEST_CASE("a header without data") {
    GgufImage image = two_tensors();
    image.tensors.clear();
    image.tensor("a", {1 << 20, 1 << 20}, kF32, 0).tensor("b", {8}, kF32, uint64_t{1} << 42);
    const std::vector<uint8_t> header = image.header().get();
    const auto file = GgufFile::from_header(header.data(), header.size(), "plan");
    REQUIRE(file->tensors().size() == 2);
    CHECK(file->find("general.architecture") != nullptr);
    CHECK(file->find_tensor("a")->n_bytes == uint64_t{1} << 42);  // 4 TiB
    CHECK(file->path() == "plan");
    CHECK(file->n_parts() == 1);
    CHECK_ERROR(GgufFile::from_header(header.data(), header.size() - 1, "plan"), format, "plan: ");
    GgufImage overlapping = two_tensors();
    overlapping.tensors.clear();
    overlapping.tensor("a", {8}, kF32, 0).tensor("b", {8}, kF32, 0);
    const std::vector<uint8_t> bad = overlapping.header().get();
    CHECK_ERROR(GgufFile::from_header(bad.data(), bad.size(), "plan"), format, "overlap");
    // The same header in a file is refused: its data is missing.
    CHECK_ERROR(open(image), format, "larger than the file");
}

TEST_CASE("values of every type") {
    GgufImage image;
    image.key("u8", U8, Bytes().u8(255)).key("i8", I8, Bytes().u8(0xfe));
    image.key("u16", U16, Bytes().u16(65535)).key("i16", I16, Bytes().u16(0xfffe));
    image.key("u32", 0xffffffff).key("i32", I32, Bytes().u32(0xfffffffe));
    image.key("u64", U64, Bytes().u64(UINT64_MAX)).key("i64", I64, Bytes().u64(UINT64_MAX - 1));
    image.key("f32", 0.5f).key("f64", F64, Bytes().f64(0.1));
    image.key("bool", BOOL, Bytes().u8(1)).key("text", "caf\xc3\xa9");
    image.array("integers", U16, 3, Bytes().u16(1).u16(2).u16(65535));
    image.array("floats", F32, 2, Bytes().f32(0.25f).f32(-1.0f));
    image.array("texts", STRING, 2, Bytes().text("").text("b"));
    image.array("flags", BOOL, 2, Bytes().u8(0).u8(1));
    image.array("none", I32, 0, Bytes());
    const Opened opened(image.bytes());

    const auto scalar = [&](const char* name) { return opened.file.find(name)->scalar; };
    CHECK((scalar("u8") == Scalar(uint64_t{255})));
    CHECK((scalar("i8") == Scalar(int64_t{-2})));
    CHECK((scalar("u16") == Scalar(uint64_t{65535})));
    CHECK((scalar("i16") == Scalar(int64_t{-2})));
    CHECK((scalar("u32") == Scalar(uint64_t{0xffffffff})));
    CHECK((scalar("i32") == Scalar(int64_t{-2})));
    CHECK((scalar("u64") == Scalar(UINT64_MAX)));
    CHECK((scalar("i64") == Scalar(int64_t{-2})));
    CHECK((scalar("f32") == Scalar(0.5)));
    CHECK((scalar("f64") == Scalar(0.1)));
    CHECK((scalar("bool") == Scalar(true)));
    CHECK((scalar("text") == Scalar(std::string("caf\xc3\xa9"))));
    CHECK(opened.file.find("integers")->integers == std::vector<int64_t>{1, 2, 65535});
    CHECK(opened.file.find("integers")->type_name() == "array[u16]");
    CHECK(opened.file.find("floats")->floats == std::vector<double>{0.25, -1.0});
    CHECK(opened.file.find("texts")->strings == std::vector<std::string>{"", "b"});
    CHECK(opened.file.find("flags")->integers == std::vector<int64_t>{0, 1});
    CHECK(opened.file.find("none")->is_array);
    CHECK(opened.file.find("none")->array_length() == 0);
    CHECK(opened.file.find("unknown") == nullptr);
    CHECK(opened.file.keys().front() == "u8");
    CHECK(opened.file.keys().back() == "none");
}

TEST_CASE("tensors and where they are") {
    GgufImage image;
    image.alignment = 64;
    image.key("general.alignment", 64u);
    image.tensor_at_end("a", {3}, kF32, 12);
    image.tensor_at_end("b", {32, 5, 2}, kQ8_0, 34 * 5 * 2);
    image.tensor_at_end("c", {1, 1, 1, 7}, kF16, 14);
    const std::vector<uint8_t> bytes = image.bytes();
    const Opened opened(bytes);
    const GgufFile& file = opened.file;
    CHECK(file.version() == 3);
    CHECK(file.alignment() == 64);
    CHECK(file.n_bytes() == bytes.size());
    CHECK(file.data_offset() == bytes.size() - image.data.size());
    REQUIRE(file.tensors().size() == 3);
    const TensorInfo &a = file.tensors()[0], &b = *file.find_tensor("b"), &c = *file.find_tensor("c");
    CHECK(a.offset == file.data_offset());
    CHECK(a.n_bytes == 12);
    CHECK(b.offset == file.data_offset() + 64);
    CHECK(b.n_bytes == 340);
    CHECK(b.n_elements() == 320);
    CHECK(b.shape() == "[32, 5, 2]");
    CHECK(b.type == GGML_TYPE_Q8_0);
    CHECK(c.offset == file.data_offset() + 64 + 384);
    CHECK(c.dimension(3) == 7);
    CHECK(a.dimension(3) == 1);
    CHECK(file.tensor_data(c) == file.data() + c.offset);
    CHECK(file.find_tensor("d") == nullptr);
}

TEST_CASE("version 2 is read as version 3") {
    GgufImage image = two_tensors();
    image.version = 2;
    CHECK(Opened(image.bytes()).file.version() == 2);
}

TEST_CASE("what is no GGUF file") {
    const TemporaryFolder folder;
    CHECK_ERROR(GgufFile(folder.path() + "/missing.gguf"), format, "missing.gguf");
    CHECK_ERROR(GgufFile{folder.path()}, format, "regular file");
    CHECK_ERROR(GgufFile(folder.write("empty.gguf", {})), format, "empty");
    CHECK_ERROR(GgufFile(std::string("a\0.gguf", 7)), argument, "NUL");

    GgufImage image = two_tensors();
    image.magic = "GGML";
    CHECK_ERROR(open(image), format, "'GGUF'");
    image.magic = "GGUF";
    for (const uint32_t version : {0u, 1u, 4u, 0xffffffffu}) {
        image.version = version;
        CHECK_ERROR(open(image), format, format("version %u", version));
    }
    image.version = 0x03000000;
    CHECK_ERROR(open(image), format, "big-endian");
}

TEST_CASE("a file cut anywhere is refused") {
    GgufImage image = two_tensors();
    image.array("texts", STRING, 2, Bytes().text("").text("word"));
    const std::vector<uint8_t> whole = image.bytes();
    const TemporaryFolder folder;
    for (size_t n = 1; n < whole.size(); ++n) {
        const std::string path = folder.write("cut.gguf", {whole.begin(), whole.begin() + n});
        CAPTURE(n);
        CHECK_ERROR(GgufFile{path}, format, path);
    }
    CHECK(GgufFile(folder.write("cut.gguf", whole)).tensors().size() == 2);
}

TEST_CASE("counts and lengths beyond the file") {
    GgufImage image = two_tensors();
    for (const uint64_t n : {uint64_t{1000}, UINT64_MAX / 32 + 1, UINT64_MAX}) {
        CAPTURE(n);
        image.n_tensors = n;
        CHECK_ERROR(open(image), format, "tensor count");
        image.n_tensors.reset();
        image.n_keys = n;
        CHECK_ERROR(open(image), format, "key count");
        image.n_keys.reset();
    }
    image.keys = {Bytes().u64(UINT64_MAX).zeros(16)};  // the length of a key's name
    CHECK_ERROR(open(image), format, "past the end");
    image.keys = {Bytes().text("k").u32(STRING).u64(UINT64_MAX - 7).zeros(16)};
    CHECK_ERROR(open(image), format, "past the end");
    image.keys = {Bytes().text("k").u32(ARRAY).u32(U64).u64(uint64_t{1} << 61).zeros(16)};  // 2^64 bytes
    CHECK_ERROR(open(image), format, "past the end");
    image.keys = {Bytes().text("k").u32(ARRAY).u32(STRING).u64(UINT64_MAX).zeros(16)};
    CHECK_ERROR(open(image), format, "past the end");
    image.keys = {Bytes().text(std::string(65536, 'k')).u32(U8).u8(0)};
    CHECK_ERROR(open(image), format, "longer than 65535");
}

TEST_CASE("keys that are not allowed") {
    const auto with_key = [](const Bytes& key) {
        GgufImage image = two_tensors();
        image.keys.push_back(key);
        return image;
    };
    CHECK_ERROR(open(with_key(Bytes().text("k").u32(13).u32(0))), format, "value type 13");
    CHECK_ERROR(open(with_key(Bytes().text("k").u32(BOOL).u8(2))), format, "'k'");
    CHECK_ERROR(open(with_key(Bytes().text("").u32(U8).u8(0))), format, "empty name");
    CHECK_ERROR(open(with_key(Bytes().text("general.architecture").u32(U8).u8(0))), format, "duplicate");
    const Bytes nested = Bytes().text("k").u32(ARRAY).u32(ARRAY).u64(1).u32(U8).u64(1).u8(0);
    CHECK_ERROR(open(with_key(nested)), format, "nested");
    const Bytes too_large = Bytes().text("k").u32(ARRAY).u32(U64).u64(1).u64(uint64_t{1} << 63);
    CHECK_ERROR(open(with_key(too_large)), format, "2^63 - 1");
}

TEST_CASE("alignments that are not allowed") {
    for (const uint32_t alignment : {0u, 4u, 12u, 48u, 1u << 21}) {
        CAPTURE(alignment);
        GgufImage image = two_tensors();
        image.key("general.alignment", alignment);
        CHECK_ERROR(open(image), format, "general.alignment");
    }
    GgufImage image = two_tensors();
    image.key("general.alignment", "32");
    CHECK_ERROR(open(image), format, "general.alignment");
}

TEST_CASE("tensors that are not allowed") {
    const auto with_tensor = [](const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset,
                                const char* name = "c") {
        GgufImage image = two_tensors();
        image.data.zeros(64);
        image.tensor(name, dims, type, offset);
        return image;
    };
    CHECK(Opened(with_tensor({8}, kF32, 64).bytes()).file.tensors().size() == 3);  // this one is

    CHECK_ERROR(open(with_tensor({}, kF32, 64)), format, "0 dimensions");
    CHECK_ERROR(open(with_tensor({1, 1, 1, 1, 1}, kF32, 64)), format, "5 dimensions");
    CHECK_ERROR(open(with_tensor({8, 0}, kF32, 64)), format, "dimension of 0");
    CHECK_ERROR(open(with_tensor({uint64_t{1} << 32, uint64_t{1} << 32}, kF32, 64)), format, "overflow");
    CHECK_ERROR(open(with_tensor({uint64_t{1} << 63}, kF32, 64)), format, "overflow");
    CHECK_ERROR(open(with_tensor({uint64_t{1} << 58}, kF32, 64)), format, "larger than the file");
    CHECK_ERROR(open(with_tensor({8}, 4, 64)), format, "type 4");  // one that ggml has removed
    CHECK_ERROR(open(with_tensor({8}, 10000, 64)), format, "type 10000");
    CHECK_ERROR(open(with_tensor({33}, kQ8_0, 64)), format, "33");
    CHECK_ERROR(open(with_tensor({8}, kF32, 72)), format, "alignment");
    CHECK_ERROR(open(with_tensor({8}, kF32, 128)), format, "truncated");
    CHECK_ERROR(open(with_tensor({17}, kF32, 64)), format, "truncated");
    CHECK_ERROR(open(with_tensor({8}, kF32, UINT64_MAX - 31)), format, "truncated");
    CHECK_ERROR(open(with_tensor({8}, kF32, 32)), format, "overlap");
    CHECK_ERROR(open(with_tensor({16}, kF32, 0)), format, "overlap");
    CHECK_ERROR(open(with_tensor({8}, kF32, 64, "a")), format, "duplicate");
    CHECK_ERROR(open(with_tensor({8}, kF32, 64, "")), format, "empty name");
}

#if !defined(_WIN32)  // where the system refuses to shorten a mapped file
TEST_CASE("a file that is shortened while it is open") {
    const Opened opened(two_tensors().bytes());
    opened.file.require_not_truncated();
    std::filesystem::resize_file(opened.file.path(), opened.file.n_bytes() - 1);
    CHECK_ERROR(opened.file.require_not_truncated(), format, "truncated");
}
#endif

}  // namespace testing
}  // namespace pydiffusion
