// emulate() turns ThreadSanitizer's reports into errors, of which the tests expect some: each report counts,
// also that of a race seen before, and none makes the program fail.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
    return "exitcode=0:suppress_equal_stacks=0:suppress_equal_addresses=0";
}
