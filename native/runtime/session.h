// Session: the state of one conversation (tokens, KV cache, current generation, cancellation flag).
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend/graph_executor.h"
#include "runtime/denoiser.h"
#include "runtime/encoder.h"
#include "sampler/sampler.h"

namespace pydiffusion {

struct GenerationParams {
    SamplerParams sampler;
    int32_t max_tokens = 0;
    std::vector<int32_t> eos;
    // Indexed from the start of the generation across canvases; positions beyond their ends are free.
    std::vector<int32_t> canvas;  // initial tokens of positions; -1: random
    std::vector<uint8_t> hold;    // 1: the position keeps its token from `canvas`
    float dropped_mass = 0.0f;    // see soft_probabilities
    int32_t canvas_length = 0;    // at most the model's; 0: the model's
    bool trim_after_eos = false;  // freeze the positions after a settled eos
    bool guided = false;          // every step waits for Session::impose
};

enum class Finish { none, eos, length, context };

// Result of one denoising step. Vectors have one entry per canvas position.
struct StepResult {
    int32_t canvas_index = 0;
    int32_t step = 0;             // counts down from steps to 1
    std::vector<int32_t> draft;   // argmax
    std::vector<int32_t> canvas;  // input of the next step
    std::vector<float> entropy;
    std::vector<uint8_t> accepted;
    bool canvas_done = false;
    std::vector<int32_t> tokens;  // if canvas_done: tokens that the canvas adds to the output
    Finish finish = Finish::none;
    double encode_seconds = 0.0;  // both for the generation so far
    double denoise_seconds = 0.0;
};

// Tokens are expected to be in the vocabulary; the bindings check them.
class Session {
  public:
    // image_tokens: most soft tokens of an image that the cache is to have room for, if more than a chunk.
    Session(std::shared_ptr<const Model> model, int32_t n_ctx, ggml_type kv_type, int32_t image_tokens = 0);

    const Model& model() const { return *model_; }
    int32_t n_ctx() const { return n_ctx_; }
    // Tokens of the content, which the cache has, or is to encode anew. Grows with each chunk.
    int32_t n_past() const { return n_past_; }
    ggml_type kv_type() const { return kv_type_; }
    uint64_t cache_bytes() const { return cache_.n_bytes(); }

    // The adapters of everything encoded and denoised from now on. The same ones: nothing happens; others:
    // ends the generation, and the content is encoded anew before anything next reads the cache. Throws
    // Error(argument), with nothing changed, for adapters of another model and scales that are not finite.
    void set_adapters(const AdapterList& adapters);
    const AdapterList& adapters() const { return adapters_; }
    // Encodes the content anew if the cache is of other adapters. If it throws, the content stays as it is.
    void refresh(const std::function<void(int32_t)>& on_chunk);

    // Starts a new imatrix over everything encoded and denoised from now on, or discards it; null when off.
    void collect_imatrix(bool on);
    const ImatrixCollector* imatrix() const { return imatrix_.get(); }

    // Starts a new trace of everything encoded and denoised from now on, or discards it; null when off.
    void trace_layers(bool on);
    const LayerTrace* layer_trace() const { return layer_trace_.get(); }

    // From any thread; images by position.
    std::vector<int32_t> tokens() const;
    std::vector<PromptImage> images() const;

    // See Denoiser::ops. Throws if another thread is using the session.
    std::map<std::string, int> step_ops() const;

    // Number of splits of the last graph, see GraphExecutor.
    int n_splits() const { return executor_.n_splits(); }

    // Costs of the last denoising step's parts; ends the current generation. See Denoiser::profile.
    std::map<std::string, Denoiser::PartCost> profile_step(bool by_operation);

    // See pydiffusion::encode. Throws, with nothing changed, for a context overflow and for images that the
    // model can't take.
    void encode(const Prompt& prompt, const std::function<void(int32_t)>& on_chunk,
                const EncoderOutputs& outputs = {});
    // Drops all but the first n tokens; encodes those again if the cache can't go back that far. Throws
    // Error(argument), with nothing changed, if that would cut an image.
    void truncate(int32_t n, const std::function<void(int32_t)>& on_chunk);
    // Tokens encoded by this session in total; shows what reuse of the cache saves.
    int64_t n_encoded() const { return n_encoded_; }
    // For saving the session, after refresh(); see KvCache::read_rows.
    const KvCache& cache() const { return cache_; }
    // Replaces tokens, images and cache rows by those of another session of the same model and cache type.
    void restore(const Prompt& content, const std::vector<std::pair<const uint8_t*, const uint8_t*>>& rows);
    // Replaces tokens, images and cache by those of another session of the same model and cache type, which
    // may have another n_ctx. With nothing changed, throws Error(context_overflow) if they don't fit,
    // Error(argument) for an image that is longer than a batch may be here.
    void copy_from(const Session& source);
    // Runs one step on a canvas and writes soft-capped logits [canvas_length][n_vocab]. `conditioning`:
    // logits for self-conditioning, may be null.
    void denoise(const std::vector<int32_t>& canvas, const float* conditioning, float* logits);

    void begin(const GenerationParams& params);
    // The phases of a step, which step() runs (see step.h): begin_step commits the previous canvas and draws
    // the step's random numbers (false after the generation's end); the caller runs slot() through a
    // denoiser; end_step processes the output and adds `seconds` to the denoising time. Of a guided
    // generation, this is the first half of a step: the canvas does not change until impose().
    bool begin_step(const std::function<void(int32_t)>& on_chunk);
    Denoiser::Slot slot() {
        return {&canvas_state_,
                &cache_,
                &generation_->canvas,
                &cancel_,
                canvas_length(generation_->params) - static_cast<int64_t>(generation_->canvas.size()),
                effective(adapters_)};
    }
    void end_step(double seconds, StepResult& result);
    // Of a batch of this session alone.
    Denoiser& denoiser() { return denoiser_; }
    GraphExecutor& executor() { return executor_; }
    // Ends the generation after an error, which may have left its self-conditioning logits half-written.
    void abandon();
    // Second half of a guided step: uses these tokens, one per position, instead of argmax and samples.
    void impose(const std::vector<int32_t>& tokens, StepResult& result);
    // After the step that finished a canvas: replaces the canvas, in output and cache, by these tokens (at
    // most canvas_length) and continues after them, even if the canvas had ended the generation. Returns
    // whether the generation now ends, and why.
    Finish amend(const std::vector<int32_t>& tokens);
    // Between the halves of a guided step: see pydiffusion::Candidates, of each position.
    Candidates candidates(int32_t k, const std::vector<int32_t>& extra);

    void cancel() { cancel_ = true; }

    // Scope of a call; throws if another thread is in one. Ends the generation if the call throws.
    class Use {
      public:
        explicit Use(Session& session);
        ~Use();
        Use(const Use&) = delete;
        Use& operator=(const Use&) = delete;

      private:
        Session& session_;
        int n_exceptions_;
    };

    // Scope of a call that only reads; throws if another thread is in one.
    class ReadUse {
      public:
        explicit ReadUse(const Session& session);
        ~ReadUse() { session_.in_use_ = false; }
        ReadUse(const ReadUse&) = delete;
        ReadUse& operator=(const ReadUse&) = delete;

      private:
        const Session& session_;
    };

  private:
    struct Generation {
        GenerationParams params;
        std::unique_ptr<Sampler> sampler;
        int32_t n_generated = 0;
        int32_t n_added = 0;  // of these, by the last canvas
        bool done = false;    // no step follows unless the last canvas is amended
        int32_t canvas_index = 0;
        int32_t step = 0;  // next step to run, counting down; 0: begin a canvas
        std::vector<int32_t> canvas;
        std::vector<int32_t> settled;   // per position, the token that it keeps; -1 if it may change
        std::vector<int32_t> finished;  // canvas to commit before the next one begins
        size_t eos_at = 0;              // position of the last draft's eos; canvas length if none
        int32_t n_same_eos = 0;         // consecutive drafts with an accepted eos there
        double frozen_entropy = 0.0;    // sum over the positions no longer denoised
        double encode_seconds = 0.0, denoise_seconds = 0.0;
        std::unique_ptr<StepResult> pending;  // guided step waiting for impose()
    };

    int32_t canvas_length(const GenerationParams& params) const {
        return params.canvas_length ? params.canvas_length : model_->hparams.canvas_length;
    }
    // Whether the cache has the content as the adapters encode it.
    bool is_fresh() const {
        return n_past_ == 0 || (!encode_anew_ && encoded_with_ == AdapterMarks(effective(adapters_)));
    }
    void set_content(Prompt content);
    void append(const Prompt& prompt, const std::function<void(int32_t)>& on_chunk,
                const EncoderOutputs& outputs = {});
    void check_images(const Prompt& prompt) const;
    void check_image(const Prompt& prompt, const PromptImage& image) const;
    void require_room(const PromptImage& image) const;
    void check_params(const GenerationParams& params) const;
    void check_hold(const GenerationParams& params) const;
    void begin_canvas(const std::function<void(int32_t)>& on_chunk);
    std::vector<int32_t> measure(StepResult& result);
    void apply_tokens(StepResult& result, const std::vector<int32_t>& chosen);
    void trim(const StepResult& result);
    void report(StepResult& result);
    void finish_canvas(StepResult& result);
    bool context_full(size_t n_more) const;
    size_t end_of(const std::vector<int32_t>& draft) const;
    size_t given_index(size_t i) const;
    int32_t given_token(size_t i) const;
    bool is_held(size_t i) const;

    std::shared_ptr<const Model> model_;
    int32_t n_ctx_;
    ggml_type kv_type_;
    KvCache cache_;
    std::unique_ptr<ImatrixCollector> imatrix_;
    std::unique_ptr<LayerTrace> layer_trace_;
    CanvasState canvas_state_;
    Denoiser denoiser_;
    GraphExecutor executor_;
    Prompt content_;  // what is in the cache
    std::atomic<int32_t> n_past_{0};
    AdapterList adapters_;
    AdapterMarks encoded_with_;  // adapters of the cache's rows
    bool encode_anew_ = false;   // the cache has less than the content
    // tokens() and images() may be called while another thread computes.
    mutable std::mutex content_mutex_;
    std::atomic<int64_t> n_encoded_{0};
    std::unique_ptr<Generation> generation_;
    std::atomic<bool> cancel_{false};
    mutable std::atomic<bool> in_use_{false};
};

}  // namespace pydiffusion
