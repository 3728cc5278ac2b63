#include "cuda_emulation/mutation.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>
#include <tuple>

#include "cuda_emulation/race_detection.h"

namespace pydiffusion::emulation {

namespace {

std::vector<Mutation>* possible = nullptr;  // where to note them, if anywhere
const Mutation* committed = nullptr;

// What is set during a call.
template <typename T>
class Scoped {
  public:
    Scoped(T*& variable, T* value) : variable_(variable) { variable_ = value; }
    ~Scoped() { variable_ = nullptr; }
    Scoped(const Scoped&) = delete;
    Scoped& operator=(const Scoped&) = delete;

  private:
    T*& variable_;
};

bool same(const Mutation& mutation, Fault fault, const Site& site) {
    return mutation.fault == fault && mutation.line == site.line && mutation.file == base_name(site.file);
}

}  // namespace

std::string base_name(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

bool is_mutated(Fault fault, const Site& site) {
    if (!possible && !committed) return false;
    const Unchecked unchecked;
    if (possible && std::none_of(possible->begin(), possible->end(),
                                 [&](const Mutation& known) { return same(known, fault, site); }))
        possible->push_back({fault, base_name(site.file), site.line});
    return committed && same(*committed, fault, site);
}

std::string Mutation::text() const {
    const char* const texts[] = {"no fault", "a barrier removed", "a mask without its highest lane",
                                 "a wait that leaves one more group of copies under way"};
    return file + ":" + std::to_string(line) + ": " + texts[static_cast<int>(fault)];
}

std::vector<Mutation> mutations_of(const std::function<void()>& work) {
    std::vector<Mutation> found;
    {
        const Scoped<std::vector<Mutation>> noting(possible, &found);
        work();
    }
    std::sort(found.begin(), found.end(), [](const Mutation& a, const Mutation& b) {
        return std::tie(a.file, a.line, a.fault) < std::tie(b.file, b.line, b.fault);
    });
    return found;
}

void with_mutation(const Mutation& mutation, const std::function<void()>& work) {
    const Scoped<const Mutation> committing(committed, &mutation);
    work();
}

bool survives(const Mutation& mutation, const std::function<bool()>& is_right) {
    constexpr unsigned max_seconds = 60;
    const pid_t child = fork();
    if (child < 0) throw std::system_error(errno, std::generic_category(), "fork");
    if (child == 0) {
        for (const int crash : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL}) signal(crash, SIG_DFL);
        alarm(max_seconds);
        dup2(open("/dev/null", O_WRONLY), STDERR_FILENO);  // the sanitizers' reports
        bool right = false;
        try {
            with_mutation(mutation, [&] { right = is_right(); });
        } catch (const EmulationError&) {
        }
        _exit(right ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace pydiffusion::emulation
