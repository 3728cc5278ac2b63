#include "runtime/session.h"

#include <algorithm>
#include <cmath>
#include <exception>

#include "model/limits.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

int32_t checked_context(const Model& model, int32_t n_ctx) {
    const Hparams& hp = model.hparams;
    if (n_ctx < hp.canvas_length + 1 || n_ctx > hp.n_ctx_train) {
        throw Error(
            ErrorKind::argument,
            format("n_ctx is %d; it must be %d (a canvas and a token) to %d (the model's context length)",
                   n_ctx, hp.canvas_length + 1, hp.n_ctx_train));
    }
    return n_ctx;
}

[[noreturn]] void refuse_second_thread() {
    throw Error(ErrorKind::general, "this session is in use by another thread: use one session per thread");
}

}  // namespace

std::vector<int32_t> Session::tokens() const {
    const std::lock_guard<std::mutex> lock(content_mutex_);
    return content_.ids;
}

std::vector<PromptImage> Session::images() const {
    const std::lock_guard<std::mutex> lock(content_mutex_);
    return content_.images;
}

std::map<std::string, int> Session::step_ops() const {
    const ReadUse use(*this);
    return denoiser_.ops();
}

Session::Use::Use(Session& session) : session_(session), n_exceptions_(std::uncaught_exceptions()) {
    if (session_.in_use_.exchange(true)) refuse_second_thread();
    if (session_.cancel_.exchange(false)) {
        session_.generation_.reset();
        session_.in_use_ = false;
        throw Error(ErrorKind::cancelled, "cancelled");
    }
}

Session::Use::~Use() {
    if (std::uncaught_exceptions() > n_exceptions_) session_.abandon();
    session_.in_use_ = false;
}

Session::ReadUse::ReadUse(const Session& session) : session_(session) {
    if (session_.in_use_.exchange(true)) refuse_second_thread();
}

void Session::abandon() {
    generation_.reset();
    denoiser_.invalidate();
    cancel_ = false;
}

Session::Session(std::shared_ptr<const Model> model, int32_t n_ctx, ggml_type kv_type, int32_t image_tokens)
    : model_(std::move(model)),
      n_ctx_(checked_context(*model_, n_ctx)),
      kv_type_(kv_type),
      cache_(model_->hparams, model_->backend, model_->device_plan, kv_type, n_ctx,
             max_batch(model_->hparams), std::clamp(image_tokens, 0, n_ctx)),
      canvas_state_(*model_),
      denoiser_(*model_),
      executor_(model_->backend) {}

void Session::encode(const Prompt& prompt, const std::function<void(int32_t)>& on_chunk,
                     const EncoderOutputs& outputs) {
    check_images(prompt);
    generation_.reset();
    append(prompt, on_chunk, outputs);
}

void Session::append(const Prompt& prompt, const std::function<void(int32_t)>& on_chunk,
                     const EncoderOutputs& outputs) {
    const std::vector<int32_t>& ids = prompt.ids;
    const int64_t needed = int64_t{n_past()} + static_cast<int64_t>(ids.size());
    if (needed > n_ctx_) {
        throw Error(
            ErrorKind::context_overflow,
            format("%zu tokens after %d do not fit the context of %d: shorten the prompt or open a session "
                   "with a larger n_ctx",
                   ids.size(), n_past(), n_ctx_));
    }
    refresh(on_chunk);
    denoiser_.invalidate();
    const AdapterList adapters = effective(adapters_);
    encoded_with_ = adapters;
    const int32_t before = n_past();
    // Keep the content in step with the cache, also if `on_chunk` throws or the work is cancelled.
    const auto sync_content = [&] {
        const std::lock_guard<std::mutex> lock(content_mutex_);
        const int32_t now = cache_.n_past();
        content_.ids.insert(content_.ids.end(), ids.begin(), ids.begin() + (now - before));
        for (PromptImage image : prompt.images) {
            image.begin += before;
            image.end += before;
            if (image.end <= now) content_.images.push_back(std::move(image));
        }
        n_past_ = now;
        n_encoded_ += now - before;
    };
    const auto show_chunk = [&](int32_t done) {
        n_past_ = cache_.n_past();
        on_chunk(done);
    };
    try {
        pydiffusion::encode(*model_, cache_, executor_, prompt, cancel_, show_chunk, outputs, adapters,
                            imatrix_.get(), layer_trace_.get());
    } catch (...) {
        sync_content();
        throw;
    }
    sync_content();
}

void Session::set_content(Prompt content) {
    const std::lock_guard<std::mutex> lock(content_mutex_);
    content_ = std::move(content);
    n_past_ = static_cast<int32_t>(content_.ids.size());
}

void Session::set_adapters(const AdapterList& adapters) {
    for (const ActiveAdapter& active : adapters) {
        if (&active.adapter->model() != model_.get())
            throw Error(ErrorKind::argument,
                        "adapter " + quoted(active.adapter->name()) + " was loaded for another model");
        if (!std::isfinite(active.scale))
            throw Error(ErrorKind::argument,
                        "the scale of adapter " + quoted(active.adapter->name()) + " is NaN or infinite");
    }
    if (adapters == adapters_) return;
    AdapterList copy = adapters;  // if that fails, nothing has changed
    generation_.reset();
    denoiser_.invalidate();
    adapters_ = std::move(copy);
}

void Session::refresh(const std::function<void(int32_t)>& on_chunk) {
    if (is_fresh()) return;
    const AdapterList adapters = effective(adapters_);
    encoded_with_ = adapters;
    denoiser_.invalidate();
    encode_anew_ = true;
    cache_.clear();
    const auto count = [&] { n_encoded_ += cache_.n_past(); };
    try {
        pydiffusion::encode(
            *model_, cache_, executor_, content_, cancel_, [&](int32_t) { on_chunk(0); }, {}, adapters);
    } catch (...) {
        count();
        throw;
    }
    count();
    encode_anew_ = false;
}

// Throws Error(argument) for an image that the cache can't take in one batch.
void Session::require_room(const PromptImage& image) const {
    if (image.n_tokens() <= cache_.longest_batch()) return;
    throw Error(
        ErrorKind::argument,
        format("the image at token %d has %d soft tokens, but this session has room for images of up to %d: "
               "lower max_soft_tokens, or open a new session once the vision file is loaded",
               image.begin, image.n_tokens(), cache_.longest_batch()));
}

// Throws Error(argument) for an image that is not among the prompt's tokens, or not usable.
void Session::check_image(const Prompt& prompt, const PromptImage& image) const {
    const auto refuse = [](const std::string& what) { throw Error(ErrorKind::argument, what); };
    require_room(image);
    const int32_t token = model_->hparams.image_tokens.image;
    for (int32_t i = image.begin; i < image.end; ++i) {
        if (prompt.ids[i] != token)
            refuse(format("token %d of the prompt is %d, but an image is there: its tokens must be %d", i,
                          prompt.ids[i], token));
    }
    const auto is_finite = [](float x) { return std::isfinite(x); };
    if (!std::all_of(image.features->begin(), image.features->end(), is_finite))
        refuse(format("the features of the image at token %d are not finite", image.begin));
}

void Session::check_images(const Prompt& prompt) const {
    if (!prompt.images.empty() && !model_->hparams.image_tokens.any())
        throw Error(ErrorKind::argument, "the model reads no images: its file has no token for them");
    int32_t end = 0;
    for (const PromptImage& image : prompt.images) {
        if (image.begin < end || image.end <= image.begin ||
            image.end > static_cast<int64_t>(prompt.ids.size())) {
            throw Error(ErrorKind::argument,
                        format("an image is at tokens %d to %d; images must be in order, not overlap, and "
                               "be within the %zu tokens of the prompt",
                               image.begin, image.end - 1, prompt.ids.size()));
        }
        check_image(prompt, image);
        end = image.end;
    }
}

void Session::truncate(int32_t n, const std::function<void(int32_t)>& on_chunk) {
    if (n < 0 || n > n_past()) {
        throw Error(ErrorKind::argument,
                    format("can't truncate to %d tokens: the session has %d", n, n_past()));
    }
    Prompt kept = {std::vector<int32_t>(content_.ids.begin(), content_.ids.begin() + n)};
    for (const PromptImage& image : content_.images) {
        if (image.begin < n && n < image.end) {
            throw Error(ErrorKind::argument,
                        format("can't truncate to %d tokens, within an image, which is at %d to %d: truncate "
                               "to %d, before it, or to %d, after it",
                               n, image.begin, image.end - 1, image.begin, image.end));
        }
        if (image.end <= n) kept.images.push_back(image);
    }
    denoiser_.invalidate();
    generation_.reset();
    const bool kept_cache = !encode_anew_ && cache_.truncate(n);
    if (!kept_cache) cache_.clear();
    const bool later = encode_anew_;
    encode_anew_ = encode_anew_ && n > 0;
    set_content(kept_cache || later ? kept : Prompt());
    if (!kept_cache && !later) append(kept, on_chunk);
}

void Session::restore(const Prompt& content,
                      const std::vector<std::pair<const uint8_t*, const uint8_t*>>& rows) {
    const std::vector<int32_t>& tokens = content.ids;
    if (tokens.size() > static_cast<size_t>(n_ctx_)) {
        throw Error(ErrorKind::context_overflow,
                    format("the saved session has %zu tokens, but this session's context is %d: open it with "
                           "a larger n_ctx",
                           tokens.size(), n_ctx_));
    }
    check_images(content);
    Prompt restored = content;  // if that fails, nothing has changed
    generation_.reset();
    denoiser_.invalidate();
    AdapterMarks adapters = effective(adapters_);
    cache_.restore(static_cast<int32_t>(tokens.size()), rows);
    set_content(std::move(restored));
    encoded_with_ = std::move(adapters);
    encode_anew_ = false;
}

void Session::copy_from(const Session& source) {
    if (source.n_past() > n_ctx_) {
        throw Error(
            ErrorKind::context_overflow,
            format("the session to copy has %d tokens, but this session's context is %d: open it with "
                   "a larger n_ctx",
                   source.n_past(), n_ctx_));
    }
    if (source.model_->hparams.n_vocab != model_->hparams.n_vocab)
        throw Error(ErrorKind::argument, "the session to copy is of another model");
    Prompt content = {source.tokens(), source.images()};  // before the cache changes: memory may run out
    for (const PromptImage& image : content.images) require_room(image);  // it may have to be encoded again
    AdapterMarks adapters = source.encoded_with_;
    const auto lock = model_->backend.lock_devices();
    cache_.copy_from(source.cache_);
    generation_.reset();
    denoiser_.invalidate();
    set_content(std::move(content));
    encoded_with_ = std::move(adapters);
    encode_anew_ = source.encode_anew_;
}

void Session::denoise(const std::vector<int32_t>& canvas, const float* conditioning, float* logits) {
    const Hparams& hp = model_->hparams;
    if (canvas.size() != static_cast<size_t>(hp.canvas_length)) {
        throw Error(ErrorKind::argument, format("the canvas has %zu tokens; this model needs %d",
                                                canvas.size(), hp.canvas_length));
    }
    if (n_past() + hp.canvas_length > n_ctx_) {
        throw Error(
            ErrorKind::context_overflow,
            format("a canvas of %d tokens after %d tokens does not fit the context of %d: open a session "
                   "with a larger n_ctx",
                   hp.canvas_length, n_past(), n_ctx_));
    }
    generation_.reset();  // its self-conditioning logits are about to be overwritten
    refresh([](int32_t) {});
    StepState& state = canvas_state_.step();
    state.self_conditioning = conditioning != nullptr;
    if (conditioning) canvas_state_.set_logits(conditioning);
    state.previous_temperature = state.temperature = 1.0f;
    state.dropped_mass = 0.0f;
    denoiser_.step({{&canvas_state_, &cache_, &canvas, &cancel_, 0, effective(adapters_)}}, executor_);
    canvas_state_.require_finite(canvas.size(), !effective(adapters_).empty());
    canvas_state_.copy_logits(logits);
}

void Session::collect_imatrix(bool on) {
    if (on && model_->backend.on_device())
        throw Error(ErrorKind::unsupported,
                    "an imatrix can only be collected on the CPU: use n_gpu_layers=0");
    // Of the file's weights, not of adapters' factors.
    const auto is_weight = [&weights = model_->weights](const ggml_tensor* tensor) {
        return weights.find(tensor->name) == tensor;
    };
    imatrix_ = on ? std::make_unique<ImatrixCollector>(is_weight) : nullptr;
    denoiser_.observe(imatrix_.get());
}

void Session::trace_layers(bool on) {
    layer_trace_ = on ? std::make_unique<LayerTrace>() : nullptr;
    denoiser_.trace(layer_trace_.get());
}

std::map<std::string, Denoiser::PartCost> Session::profile_step(bool by_operation) {
    generation_.reset();
    return denoiser_.profile(executor_, cancel_, by_operation);
}

}  // namespace pydiffusion
