#include "runtime/batch.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "bindings/session_types.h"

namespace pydiffusion {

namespace {

// Per session: its Step, None if its generation had ended, or the exception that ended it.
nb::list next_steps(Batch& batch, const std::vector<Session*>& sessions) {
    std::vector<StepOutcome> outcomes;
    {
        const WithoutGil release;
        outcomes = batch.next_steps(sessions, [](int32_t) { check_signals(); });
    }
    nb::list result;
    for (StepOutcome& outcome : outcomes) {
        if (outcome.error) {
            result.append(to_exception(outcome.error));
        } else if (outcome.result.step == 0) {
            result.append(nb::none());
        } else {
            result.append(nb::cast(std::move(outcome.result)));
        }
    }
    return result;
}

}  // namespace

void bind_batch(nb::module_& m) {
    nb::class_<Batch>(
        m, "Batch",
        "Batched denoising of several sessions of a model in one graph. Use it from one thread at a time.")
        .def(
            "__init__", [](Batch* self, const PyModel& model) { new (self) Batch(model.model); },
            nb::arg("model"))
        .def_prop_ro("n_graphs", &Batch::n_graphs,
                     "Number of graphs used by the last step; more than 1 if memory for one ran out.")
        .def("next_steps", next_steps, nb::arg("sessions"),
             nb::sig("def next_steps(self, sessions: Sequence[Session]) -> list[Step | Exception | None]"),
             "Run one step of each session's generation. Per session: its Step, None if its generation has "
             "ended, or the exception that ended it.");
}

}  // namespace pydiffusion
