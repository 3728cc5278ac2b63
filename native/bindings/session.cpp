#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bindings/bindings.h"
#include "bindings/session_types.h"
#include "bindings/token_ids.h"
#include "model/architecture.h"
#include "runtime/step.h"
#include "sampler/registry.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

// Calls `progress(done, total)` after each chunk of a prompt and raises KeyboardInterrupt on Ctrl-C.
std::function<void(int32_t)> between_chunks(const nb::object& progress, size_t total) {
    return [&progress, total](int32_t done) { report(progress, done, total); };
}

void ignore_chunks(int32_t) { check_signals(); }

// (first soft token, features (n, d), key) of each image
using Images = std::vector<std::tuple<int64_t, Array2<float>, nb::bytes>>;

Prompt prompt_of(const Array1<int32_t>& ids, const Images& images, const Hparams& hp) {
    Prompt prompt = {checked_tokens(ids, hp.n_vocab)};
    for (const auto& [begin, features, key] : images) {
        const int64_t n = static_cast<int64_t>(features.shape(0)), d = hp.n_embd;
        if (static_cast<int64_t>(features.shape(1)) != d) {
            throw Error(
                ErrorKind::argument,
                format(
                    "the features of an image have the shape (%zu, %zu), but this model needs (n, %d): they "
                    "are from the image encoder of another model",
                    features.shape(0), features.shape(1), hp.n_embd));
        }
        const int64_t n_left = begin < 0 ? 0 : static_cast<int64_t>(prompt.ids.size()) - begin;
        if (n < 1 || n > n_left)
            throw Error(ErrorKind::argument,
                        format("an image of %lld soft tokens at index %lld is not within the %zu tokens",
                               static_cast<long long>(n), static_cast<long long>(begin), prompt.ids.size()));
        auto values = std::make_shared<const std::vector<float>>(features.data(), features.data() + n * d);
        prompt.images.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(begin + n),
                                 std::move(values), std::string(key.c_str(), key.size())});
    }
    return prompt;
}

std::optional<Numpy2<float>> encode_ids(Session& session, const Array1<int32_t>& ids, const Images& images,
                                        bool return_hidden, const nb::object& progress) {
    const Hparams& hp = session.model().hparams;
    const Prompt prompt = prompt_of(ids, images, hp);
    std::optional<Numpy2<float>> hidden;
    if (return_hidden) hidden = new_numpy<float>(prompt.ids.size(), hp.n_embd);
    const WithoutGil release;
    const Session::Use use(session);
    session.encode(prompt, between_chunks(progress, prompt.ids.size()),
                   {hidden ? hidden->data() : nullptr, nullptr});
    return hidden;
}

nb::typed<nb::list, nb::typed<nb::tuple, int, int, nb::bytes>> images_of(const Session& session) {
    nb::list images;
    for (const PromptImage& image : session.images())
        images.append(
            nb::make_tuple(image.begin, image.n_tokens(), nb::bytes(image.key.data(), image.key.size())));
    return nb::typed<nb::list, nb::typed<nb::tuple, int, int, nb::bytes>>(images);
}

Numpy2<float> image_features(const Session& session, size_t i) {
    const std::vector<PromptImage> images = session.images();
    if (i >= images.size())
        throw Error(ErrorKind::argument,
                    format("the session has %zu images; there is no %zu", images.size(), i));
    const auto features = new_numpy<float>(images[i].n_tokens(), session.model().hparams.n_embd);
    std::copy(images[i].features->begin(), images[i].features->end(), features.data());
    return features;
}

Numpy1<float> next_logits(Session& session, const Array1<int32_t>& ids) {
    const Hparams& hp = session.model().hparams;
    const std::vector<int32_t> tokens = checked_tokens(ids, hp.n_vocab);
    if (tokens.empty()) throw Error(ErrorKind::argument, "no token to encode: give at least one");
    std::vector<float> logits(hp.n_vocab);
    {
        const WithoutGil release;
        const Session::Use use(session);
        session.encode({tokens}, ignore_chunks, {nullptr, logits.data()});
    }
    return to_numpy(std::move(logits));
}

// Per layer (k, v), copies as uint8 (n_rows, row_bytes).
nb::list cache_rows(Session& session) {
    const Session::Use use(session);
    {
        const WithoutGil release;
        session.refresh(ignore_chunks);
    }
    const KvCache& cache = session.cache();
    nb::list layers;
    for (int32_t i = 0; i < session.model().hparams.n_layer; ++i) {
        const bool sliding = session.model().hparams.layers[i].sliding;
        const size_t n_rows = cache.n_past() - (sliding ? cache.first_kept() : 0),
                     row_bytes = cache.row_bytes(i);
        const auto k = new_numpy<uint8_t>(n_rows, row_bytes), v = new_numpy<uint8_t>(n_rows, row_bytes);
        cache.read_rows(i, false, k.data());
        cache.read_rows(i, true, v.data());
        layers.append(nb::make_tuple(k, v));
    }
    return layers;
}

void restore(Session& session, const Array1<int32_t>& tokens,
             const std::vector<std::pair<Array2<uint8_t>, Array2<uint8_t>>>& layers, const Images& images) {
    const Session::Use use(session);
    const Hparams& hp = session.model().hparams;
    if (layers.size() != hp.layers.size()) {
        throw Error(ErrorKind::argument, format("the saved session has %zu layers, but this model has %zu",
                                                layers.size(), hp.layers.size()));
    }
    const size_t n = tokens.shape(0);
    std::vector<std::pair<const uint8_t*, const uint8_t*>> rows;
    for (size_t i = 0; i < layers.size(); ++i) {
        const size_t n_rows = hp.layers[i].sliding ? n - KvCache::tile_start(n, hp.window) : n;
        for (const Array2<uint8_t>* array : {&layers[i].first, &layers[i].second}) {
            if (array->shape(0) != n_rows || array->shape(1) != session.cache().row_bytes(i)) {
                throw Error(ErrorKind::argument, format("layer %zu of the saved session has %zu rows of %zu "
                                                        "bytes, expected %zu rows of %zu: it is "
                                                        "from another model or KV cache type",
                                                        i, array->shape(0), array->shape(1), n_rows,
                                                        session.cache().row_bytes(i)));
            }
        }
        rows.emplace_back(layers[i].first.data(), layers[i].second.data());
    }
    session.restore(prompt_of(tokens, images, hp), rows);
}

void copy_from(Session& session, const Session& source) {
    if (&session == &source) return;
    const WithoutGil release;
    const Session::ReadUse reading(source);  // first: if it fails, the session's generation continues
    const Session::Use use(session);
    session.copy_from(source);
}

void truncate(Session& session, int32_t n) {
    const WithoutGil release;
    const Session::Use use(session);
    session.truncate(n, ignore_chunks);
}

Numpy2<float> denoise(Session& session, const Array1<int32_t>& canvas,
                      std::optional<Array2<float>> conditioning) {
    const Hparams& hp = session.model().hparams;
    const size_t n = hp.canvas_length, n_vocab = hp.n_vocab;
    if (conditioning && (conditioning->shape(0) != n || conditioning->shape(1) != n_vocab)) {
        throw Error(ErrorKind::argument, format("self_conditioning has shape (%zu, %zu), expected (%zu, %zu)",
                                                conditioning->shape(0), conditioning->shape(1), n, n_vocab));
    }
    const std::vector<int32_t> tokens = checked_tokens(canvas, hp.n_vocab);
    const auto logits = new_numpy<float>(n, n_vocab);
    const WithoutGil release;
    const Session::Use use(session);
    session.denoise(tokens, conditioning ? conditioning->data() : nullptr, logits.data());
    return logits;
}

void set_adapters(Session& session, const std::vector<std::pair<const PyAdapter*, float>>& list) {
    AdapterList adapters;
    for (const auto& [adapter, scale] : list) {
        if (!adapter) throw nb::type_error("an adapter is None");
        adapters.push_back({adapter->adapter, scale});
    }
    const WithoutGil release;  // memory of a device may be freed
    const Session::Use use(session);
    session.set_adapters(adapters);
}

nb::list adapters_of(const Session& session) {
    nb::list result;
    for (const ActiveAdapter& active : session.adapters())
        result.append(nb::make_tuple(PyAdapter{active.adapter}, active.scale));
    return result;
}

nb::dict imatrix(Session& session) {
    const Session::Use use(session);
    nb::dict result;
    if (!session.imatrix()) return result;
    for (const auto& [name, s] : session.imatrix()->by_weight()) {
        const size_t n_per_row = s.n_per_row;
        result[name.c_str()] =
            nb::make_tuple(to_numpy(s.sums, s.counts.size(), n_per_row), to_numpy(s.counts));
    }
    return result;
}

// (layer, name) -> copy as float32 (n_tokens, width)
nb::dict layer_trace(Session& session) {
    const Session::Use use(session);
    nb::dict result;
    if (!session.layer_trace()) return result;
    for (const auto& [place, rows] : session.layer_trace()->rows()) {
        const size_t width = rows.width;
        result[nb::make_tuple(place.first, place.second)] =
            to_numpy(rows.values, rows.values.size() / width, width);
    }
    return result;
}

nb::dict step_ops(const Session& session) {
    nb::dict ops;
    for (const auto& [name, count] : session.step_ops()) ops[name.c_str()] = count;
    return ops;
}

nb::dict profile_step(Session& session, bool by_operation) {
    std::map<std::string, Denoiser::PartCost> costs;
    {
        const WithoutGil release;
        const Session::Use use(session);
        costs = session.profile_step(by_operation);
    }
    nb::dict result;
    for (const auto& [part, cost] : costs) {
        result[part.c_str()] = nb::make_tuple(cost.seconds, cost.operations, cost.bytes);
    }
    return result;
}

std::optional<StepResult> run_step(Session& session) {
    const WithoutGil release;
    return next_step(session, ignore_chunks);
}

StepResult impose(Session& session, const Array1<int32_t>& tokens) {
    const std::vector<int32_t> chosen = checked_tokens(tokens, session.model().hparams.n_vocab);
    const WithoutGil release;
    const Session::Use use(session);
    StepResult result;
    session.impose(chosen, result);
    return result;
}

std::tuple<Numpy2<int32_t>, Numpy2<float>, Numpy2<float>> candidates(Session& session, int32_t k,
                                                                     const Array1<int32_t>& extra) {
    const std::vector<int32_t> also = checked_tokens(extra, session.model().hparams.n_vocab);
    Candidates found;
    {
        const WithoutGil release;
        const Session::Use use(session);
        found = session.candidates(k, also);
    }
    const size_t width = k, n = found.tokens.size() / width;
    return {to_numpy(std::move(found.tokens), n, width), to_numpy(std::move(found.logits), n, width),
            to_numpy(std::move(found.extra), n, also.size())};
}

const char* finish_name(Finish finish) {
    switch (finish) {
        case Finish::eos:
            return "eos";
        case Finish::length:
            return "length";
        case Finish::context:
            return "context";
        case Finish::none:
            break;
    }
    return "";
}

const char* amend(Session& session, const Array1<int32_t>& tokens) {
    const std::vector<int32_t> replacement = checked_tokens(tokens, session.model().hparams.n_vocab);
    const Session::Use use(session);
    return finish_name(session.amend(replacement));
}

// The options of a sampler, each by name. Throws Error(argument) for one that is missing or unknown.
SamplerValues sampler_values(const SamplerTable& table, const nb::kwargs& options) {
    SamplerValues values;
    for (const auto& [name, value] : options) {
        const auto known = nb::cast<std::string>(name);
        int32_t count = 0;
        double number = 0.0;
        const bool is_count = table.option(known).integer;
        if (!(is_count ? nb::try_cast(value, count) : nb::try_cast(value, number)))
            throw nb::type_error((known + " must be " + (is_count ? "an integer" : "a number")).c_str());
        values[known] = is_count ? count : number;
    }
    for (const SamplerOption& option : table.options) {
        if (!values.count(option.name))
            throw Error(ErrorKind::argument,
                        std::string("the sampler's option ") + option.name + " is missing");
    }
    return values;
}

void bind_step(nb::module_& m) {
    constexpr auto owned = nb::rv_policy::automatic;  // properties refer to the Step by default
    nb::class_<StepResult>(m, "Step",
                           "Result of one denoising step; arrays have one entry per canvas position.")
        .def_ro("canvas_index", &StepResult::canvas_index)
        .def_ro("step", &StepResult::step, "Counts down from the number of steps to 1.")
        .def_prop_ro(
            "draft", [](const StepResult& s) { return to_numpy(s.draft); }, owned, "argmax, int32")
        .def_prop_ro(
            "canvas", [](const StepResult& s) { return to_numpy(s.canvas); }, owned,
            "input of the next step, int32")
        .def_prop_ro(
            "entropy", [](const StepResult& s) { return to_numpy(s.entropy); }, owned, "nats, float32")
        .def_prop_ro(
            "accepted", [](const StepResult& s) { return to_bools(s.accepted); }, owned, "bool")
        .def_ro("canvas_done", &StepResult::canvas_done)
        .def_prop_ro(
            "tokens", [](const StepResult& s) { return to_numpy(s.tokens); }, owned,
            "If canvas_done: the canvas, cut before the first eos and at max_tokens, int32; else empty.")
        .def_prop_ro("finish", [](const StepResult& s) { return finish_name(s.finish); })
        .def_prop_ro(
            "timings",
            [](const StepResult& s) {
                nb::dict d;
                d["encode"] = s.encode_seconds;
                d["denoise"] = s.denoise_seconds;
                return nb::typed<nb::dict, nb::str, double>(d);
            },
            "Seconds of the generation so far.");
}

}  // namespace

void bind_session(nb::module_& m) {
    bind_step(m);
    m.def(
        "token_array",
        [](const Array1<int64_t>& ids, int32_t n_vocab) { return to_numpy(checked_tokens(ids, n_vocab)); },
        nb::arg("ids").noconvert(), nb::arg("n_vocab"),
        "Token ids as int32; raises ValueError for one outside the vocabulary.");
    nb::class_<Session>(m, "Session",
                        "State of one conversation on a model. Use it from one thread at a time.")
        .def(
            "__init__",
            [](Session* self, const PyModel& model, int32_t n_ctx, int32_t image_tokens) {
                new (self) Session(model.model, n_ctx, model.kv_type, image_tokens);
            },
            nb::arg("model"), nb::arg("n_ctx"), nb::arg("image_tokens") = 0,
            "image_tokens: most soft tokens of an image that the cache is to have room for.")
        .def_prop_ro("n_past", &Session::n_past)
        .def_prop_ro("n_ctx", &Session::n_ctx)
        .def_prop_ro("cache_bytes", &Session::cache_bytes)
        .def("set_adapters", set_adapters, nb::arg("adapters"),
             nb::sig("def set_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None"),
             "Use these adapters, each with the factor of its changes, from now on. Others than before end "
             "the generation, and the content is encoded anew before anything next reads it.")
        .def_prop_ro("adapters", adapters_of, nb::sig("def adapters(self) -> list[tuple[Adapter, float]]"))
        .def(
            "collect_imatrix",
            [](Session& session, bool on) {
                const Session::Use use(session);
                session.collect_imatrix(on);
            },
            nb::arg("on"),
            "Start a new imatrix over everything encoded and denoised from now on, or discard it.")
        .def("imatrix", imatrix,
             "Weight name -> (sums of squares (n_matrices, n_per_row) float64, counts (n_matrices,) int64).")
        .def(
            "trace_layers",
            [](Session& session, bool on) {
                const Session::Use use(session);
                session.trace_layers(on);
            },
            nb::arg("on"),
            "Start a new trace of the layers of everything encoded and denoised from now on, or discard it.")
        .def("layer_trace", layer_trace,
             "(layer, name) -> values (n_tokens, width) float32: input of the first layer, and of each its "
             "hidden states after attention, the output of its dense MLP, its router's scores times sqrt(d), "
             "its output.")
        .def_prop_ro(
            "tokens", [](const Session& s) { return to_numpy(s.tokens()); }, nb::rv_policy::automatic)
        .def_prop_ro("step_ops", step_ops,
                     "Operations of the last denoising step: name -> number of graph nodes.")
        .def_prop_ro("n_splits", &Session::n_splits,
                     "Number of splits of the last graph; a new one begins wherever the device changes.")
        .def("profile_step", profile_step, nb::arg("by_operation") = false,
             "Run the last step's graph again, part by part: name -> (seconds, operations, bytes read).")
        .def("encode", encode_ids, nb::arg("ids").noconvert(), nb::arg("images").noconvert() = nb::list(),
             nb::arg("return_hidden") = false, nb::arg("progress") = nb::none(),
             "images: (index in ids of the first soft token, features (n, d), key) of each, in order; at its "
             "places ids has the image token.")
        .def_prop_ro("images", images_of,
                     "Images in the cache: (position of the first soft token, number of soft tokens, key).")
        .def("image_features", image_features, nb::arg("i"), "Of images[i], a copy, (n, d).")
        .def(
            "next_logits", next_logits, nb::arg("ids").noconvert(),
            "Encode ids and return the soft-capped logits of the token that would follow them when the model "
            "is read causally, (n_vocab,) float32.")
        .def_prop_ro("n_encoded", &Session::n_encoded, "Number of tokens encoded so far.")
        .def("cache_rows", cache_rows, "Per layer (k, v), uint8 (n_rows, row_bytes), for restore().")
        .def("restore", restore, nb::arg("tokens").noconvert(), nb::arg("layers"),
             nb::arg("images").noconvert() = nb::list(),
             "Replace the content by tokens, cache_rows() and images of a session of the same model and KV "
             "cache type.")
        .def("copy_from", copy_from, nb::arg("source"),
             "Replace the content by a copy of another session's, which may have another n_ctx; the session "
             "itself: nothing happens.")
        .def("truncate", truncate, nb::arg("n"))
        .def("denoise", denoise, nb::arg("canvas").noconvert(),
             nb::arg("self_conditioning").noconvert().none())
        .def(
            "begin",
            [](Session& session, int32_t max_tokens, uint64_t seed, const std::vector<int32_t>& eos,
               const std::optional<Array1<int32_t>>& canvas, const std::optional<Array1<uint8_t>>& hold,
               float dropped_mass, int32_t canvas_length, bool trim_after_eos, bool guided,
               const nb::kwargs& sampler_options) {
                const int32_t n_vocab = session.model().hparams.n_vocab;
                const SamplerTable& table = sampler_table(session.model().hparams.architecture->sampler());
                GenerationParams params = {{sampler_values(table, sampler_options), seed},
                                           max_tokens,
                                           checked_tokens(eos.data(), eos.size(), n_vocab, " of eos")};
                if (canvas) params.canvas = checked_tokens(*canvas, n_vocab, " of the canvas", -1);
                if (hold) params.hold = to_vector(*hold);
                params.dropped_mass = dropped_mass;
                params.canvas_length = canvas_length;
                params.trim_after_eos = trim_after_eos;
                params.guided = guided;
                const Session::Use use(session);
                session.begin(params);
            },
            nb::kw_only(), nb::arg("max_tokens"), nb::arg("seed"), nb::arg("eos"),
            nb::arg("canvas").noconvert() = nb::none(), nb::arg("hold").noconvert() = nb::none(),
            nb::arg("dropped_mass") = 0.0f, nb::arg("canvas_length") = 0, nb::arg("trim_after_eos") = false,
            nb::arg("guided") = false, nb::arg("sampler_options"),
            "Start a generation. sampler_options: all options of the model's sampler, see sampler_options().")
        .def("next_step", run_step, "Run one denoising step of the generation; None after its end.")
        .def("impose", impose, nb::arg("tokens").noconvert(),
             "Second half of a guided step: these tokens are its draft and fill the accepted positions.")
        .def("amend", amend, nb::arg("tokens").noconvert(),
             "After the step that finished a canvas: replace it by these tokens and continue after them. "
             "Returns the finish reason if they end the generation, else an empty string.")
        .def("candidates", candidates, nb::arg("k"), nb::arg("extra").noconvert(),
             "Between the halves of a guided step: the top k tokens of each position (canvas_length, k), "
             "their logits, and the logits of the extra tokens (canvas_length, n_extra).")
        .def("cancel", &Session::cancel,
             "Make the current or next call raise GenerationCancelled; may be called from any thread.");
}

}  // namespace pydiffusion
