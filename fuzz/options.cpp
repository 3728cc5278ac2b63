// What the sanitizer does for each freed block costs more than the layers under test: a small quarantine and
// short stacks make the targets three times as fast. ASAN_OPTIONS overrides it, for a finding that needs
// more.
extern "C" const char* __asan_default_options() {
    return "quarantine_size_mb=4:malloc_context_size=2:detect_leaks=1:allocator_may_return_null=1";
}
