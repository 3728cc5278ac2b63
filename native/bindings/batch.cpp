#include "runtime/batch.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "bindings/session_types.h"

namespace pydiffusion {

namespace {

// Per session its Step, the exception that ended it, or None when its generation was over.
nb::list next_steps(Batch& batch, const std::vector<Session*>& sessions) {
    std::vector<Batch::Outcome> outcomes;
    {
        const WithoutGil release;
        outcomes = batch.next_steps(sessions, [](int32_t) { check_signals(); });
    }
    nb::list result;
    for (Batch::Outcome& outcome : outcomes) {
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
    nb::class_<Batch>(m, "Batch", "Denoises several sessions of a model in one graph. One thread at a time.")
        .def(
            "__init__", [](Batch* self, const PyModel& model) { new (self) Batch(model.model); },
            nb::arg("model"))
        .def_prop_ro("n_graphs", &Batch::n_graphs, "Graphs that the last step took; of few memory, several.")
        .def("next_steps", next_steps, nb::arg("sessions"),
             "One step of each session's generation: its Step, None after its end, or the exception that "
             "ended it.");
}

}  // namespace pydiffusion
