// Default sanitizer options. ASan's work per freed block costs more than the code under test: a small
// quarantine and short stack traces make the targets three times as fast. Override with ASAN_OPTIONS to debug
// a finding.
extern "C" const char* __asan_default_options() {
    return "quarantine_size_mb=4:malloc_context_size=2:detect_leaks=1:allocator_may_return_null=1";
}
