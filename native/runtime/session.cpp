#include "runtime/session.h"

#include <algorithm>
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
    const std::lock_guard<std::mutex> lock(tokens_mutex_);
    return tokens_;
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

Session::Session(std::shared_ptr<const Model> model, int32_t n_ctx, ggml_type kv_type)
    : model_(std::move(model)),
      n_ctx_(checked_context(*model_, n_ctx)),
      kv_type_(kv_type),
      cache_(model_->hparams, model_->backend, model_->device_plan, kv_type, n_ctx,
             max_batch(model_->hparams)),
      canvas_state_(*model_),
      denoiser_(*model_),
      executor_(model_->backend) {}

void Session::encode(const std::vector<int32_t>& ids, const std::function<void(int32_t)>& on_chunk,
                     const EncoderOutputs& outputs) {
    generation_.reset();
    append(ids, on_chunk, outputs);
}

void Session::append(const std::vector<int32_t>& ids, const std::function<void(int32_t)>& on_chunk,
                     const EncoderOutputs& outputs) {
    const int64_t needed = int64_t{n_past()} + static_cast<int64_t>(ids.size());
    if (needed > n_ctx_) {
        throw Error(
            ErrorKind::context_overflow,
            format("%zu tokens after %d do not fit the context of %d: shorten the prompt or open a session "
                   "with a larger n_ctx",
                   ids.size(), n_past(), n_ctx_));
    }
    denoiser_.invalidate();
    const int32_t before = n_past();
    // Keep the token list in step with the cache, also if `on_chunk` throws or the work is cancelled.
    const auto sync_tokens = [&] {
        const std::lock_guard<std::mutex> lock(tokens_mutex_);
        tokens_.insert(tokens_.end(), ids.begin(), ids.begin() + (n_past() - before));
        n_encoded_ += n_past() - before;
    };
    try {
        pydiffusion::encode(*model_, cache_, executor_, ids, cancel_, on_chunk, outputs, imatrix_.get(),
                            layer_trace_.get());
    } catch (...) {
        sync_tokens();
        throw;
    }
    sync_tokens();
}

void Session::truncate(int32_t n, const std::function<void(int32_t)>& on_chunk) {
    if (n < 0 || n > n_past()) {
        throw Error(ErrorKind::argument,
                    format("can't truncate to %d tokens: the session has %d", n, n_past()));
    }
    denoiser_.invalidate();
    generation_.reset();
    const std::vector<int32_t> kept(tokens_.begin(), tokens_.begin() + n);
    const bool kept_cache = cache_.truncate(n);
    if (!kept_cache) cache_.clear();
    {
        const std::lock_guard<std::mutex> lock(tokens_mutex_);
        tokens_.resize(kept_cache ? n : 0);
    }
    if (!kept_cache) encode(kept, on_chunk);
}

void Session::restore(const std::vector<int32_t>& tokens,
                      const std::vector<std::pair<const uint8_t*, const uint8_t*>>& rows) {
    if (tokens.size() > static_cast<size_t>(n_ctx_)) {
        throw Error(ErrorKind::context_overflow,
                    format("the saved session has %zu tokens, but this session's context is %d: open it with "
                           "a larger n_ctx",
                           tokens.size(), n_ctx_));
    }
    std::vector<int32_t> restored = tokens;  // if that fails, nothing has changed
    generation_.reset();
    denoiser_.invalidate();
    cache_.restore(static_cast<int32_t>(tokens.size()), rows);
    const std::lock_guard<std::mutex> lock(tokens_mutex_);
    tokens_ = std::move(restored);
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
    std::vector<int32_t> tokens = source.tokens();  // before the cache changes: memory may run out
    const auto lock = model_->backend.lock_devices();
    cache_.copy_from(source.cache_);
    generation_.reset();
    denoiser_.invalidate();
    const std::lock_guard<std::mutex> tokens_lock(tokens_mutex_);
    tokens_ = std::move(tokens);
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
    StepState& state = canvas_state_.step();
    state.self_conditioning = conditioning != nullptr;
    if (conditioning) canvas_state_.set_logits(conditioning);
    state.previous_temperature = state.temperature = 1.0f;
    state.dropped_mass = 0.0f;
    denoiser_.step({{&canvas_state_, &cache_, &canvas, &cancel_}}, executor_);
    canvas_state_.require_finite(canvas.size());
    canvas_state_.copy_logits(logits);
}

void Session::collect_imatrix(bool on) {
    if (on && model_->backend.on_device())
        throw Error(ErrorKind::unsupported,
                    "an imatrix can only be collected on the CPU: use n_gpu_layers=0");
    imatrix_ = on ? std::make_unique<ImatrixCollector>() : nullptr;
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
