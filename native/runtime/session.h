// One conversation: its tokens, cache, random stream and cancellation flag. Weights are the model's.
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

namespace pydiffusion {

struct GenerationParams {
    int32_t max_tokens = 256;
    int32_t steps = 48;
    float t_min = 0.4f;
    float t_max = 0.8f;
    float entropy_bound = 0.1f;
    int32_t stability_threshold = 1;
    float confidence_threshold = 0.005f;
    uint64_t seed = 0;
    std::vector<int32_t> eos;
    // Counted from the generation's beginning, canvas after canvas; what lies behind their ends is free.
    std::vector<int32_t> canvas;  // tokens that positions begin with; -1: a random one
    std::vector<uint8_t> hold;    // 1: the position keeps its token of `canvas`
    float dropped_mass = 0.0f;    // see soft_probabilities
    int32_t canvas_length = 0;    // shorter canvases than the model's; 0: the model's
    bool trim_after_eos = false;  // freeze what lies behind an eos that has settled
    bool guided = false;          // every step waits for the caller's choice, see Session::impose
};

enum class Finish { none, eos, length, context };

// What one denoising step did. Vectors have one entry per canvas position.
struct StepResult {
    int32_t canvas_index = 0;
    int32_t step = 0;             // counts down from steps to 1
    std::vector<int32_t> draft;   // argmax
    std::vector<int32_t> canvas;  // input of the next step
    std::vector<float> entropy;
    std::vector<uint8_t> accepted;
    bool canvas_done = false;
    std::vector<int32_t> tokens;  // when canvas_done: what the canvas adds to the answer
    Finish finish = Finish::none;
    double encode_seconds = 0.0;  // of the whole generation so far
    double denoise_seconds = 0.0;
};

class Session {
  public:
    Session(std::shared_ptr<const Model> model, int32_t n_ctx, ggml_type kv_type);

    const Model& model() const { return *model_; }
    int32_t n_ctx() const { return n_ctx_; }
    int32_t n_past() const { return cache_.n_past(); }
    ggml_type kv_type() const { return kv_type_; }
    uint64_t cache_bytes() const { return cache_.n_bytes(); }

    // Begins anew, or ends, the imatrix of activations of all that is encoded and denoised; null when off.
    void collect_imatrix(bool on);
    const ImatrixCollector* imatrix() const { return imatrix_.get(); }

    std::vector<int32_t> tokens() const;  // from any thread

    // Throws when another thread is using the session.
    std::map<std::string, int> step_ops() const;

    // Pieces of the graph last laid out, see GraphExecutor.
    int n_splits() const { return executor_.n_splits(); }

    // What the parts of the last denoising step cost; ends a generation under way. See Denoiser::profile.
    std::map<std::string, Denoiser::PartCost> profile_step(bool by_operation);

    // See pydiffusion::encode. Refuses tokens out of range and what does not fit the context, with nothing
    // done.
    void encode(const std::vector<int32_t>& ids, const std::function<void(int32_t)>& between,
                std::vector<float>* hidden);
    // Forgets all but the first n tokens; encodes them again where the cache no longer allows less.
    void truncate(int32_t n, const std::function<void(int32_t)>& between);
    // How many tokens this session has put through the encoder in all: what reuse of the cache saves shows
    // here.
    int64_t n_encoded() const { return n_encoded_; }
    // The cache's rows, for a copy of this session; see KvCache.
    const KvCache& cache() const { return cache_; }
    // Takes tokens and cache rows of another session of the same model and cache type, in place of its own.
    void restore(const std::vector<int32_t>& tokens,
                 const std::vector<std::pair<const uint8_t*, const uint8_t*>>& rows);
    // Logits [canvas_length][n_vocab], soft-capped, for one canvas; `conditioning` may be null.
    const float* denoise(const std::vector<int32_t>& canvas, const float* conditioning);

    void begin(const GenerationParams& params);
    // One step of the generation begun; false after its end. Of a guided one, the step's first half:
    // measured, with nothing taken over.
    bool next_step(StepResult& result, const std::function<void(int32_t)>& between);
    // A step in its parts, for those that denoise several sessions at once (see batch.h): begin_step commits
    // the canvas before and draws what the step needs (false after the generation's end); the slot goes
    // through a denoiser, which took so many seconds; end_step takes over what came out.
    bool begin_step(const std::function<void(int32_t)>& between);
    Denoiser::Slot slot() {
        return {&canvas_state_, &cache_, &generation_->canvas, &cancel_,
                canvas_length(generation_->params) - static_cast<int64_t>(generation_->canvas.size())};
    }
    void end_step(double seconds, StepResult& result);
    // Ends a generation after an error half-way: its conditioning logits may be half-written.
    void abandon();
    // The second half of a guided step: these tokens, one per position, in place of argmax and draws.
    void impose(const std::vector<int32_t>& tokens, StepResult& result);
    // After the step that finished a canvas: these tokens, no more than it has, take its place in answer and
    // cache, and the generation goes on behind them, also where the canvas ended it. Returns whether they
    // end it themselves.
    Finish amend(const std::vector<int32_t>& tokens);
    // Between the halves: the k largest logits of every position with their tokens [k, canvas_length], and
    // those of `extra` [n_extra, canvas_length].
    struct Candidates {
        std::vector<int32_t> tokens;
        std::vector<float> logits, extra;
    };
    Candidates candidates(int32_t k, const std::vector<int32_t>& extra);

    void cancel() { cancel_ = true; }

    // Held while a call runs; a second call at the same time throws.
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

  private:
    struct Generation {
        GenerationParams params;
        int32_t n_generated = 0;
        int32_t n_added = 0;  // of these by the last canvas
        bool over = false;    // nothing follows, unless the last canvas is amended
        int32_t canvas_index = 0;
        int32_t step = 0;  // the next one to run; 0: a canvas has to be begun
        std::vector<int32_t> canvas;
        std::vector<int32_t> finished;              // a canvas to be committed before the next begins
        std::vector<std::vector<int32_t>> history;  // the last stability_threshold argmaxes
        size_t eos_at = 0;                          // where the last draft ended; its size, when nowhere
        int32_t n_ended_there = 0;                  // drafts in a row that did, accepted
        double frozen_entropy = 0.0;                // of the positions that are no longer denoised, together
        double encode_seconds = 0.0, denoise_seconds = 0.0;
        std::unique_ptr<StepResult> half;  // of a guided step that waits for `impose`
        std::vector<int32_t> noise;        // of that step, for what is not accepted
    };

    int32_t canvas_length(const GenerationParams& params) const {
        return params.canvas_length ? params.canvas_length : model_->hparams.canvas_length;
    }
    void append(const std::vector<int32_t>& ids, const std::function<void(int32_t)>& between,
                std::vector<float>* hidden);
    void check_tokens(const std::vector<int32_t>& ids, const char* what) const;
    void check_canvas(const GenerationParams& params) const;
    void begin_canvas(const std::function<void(int32_t)>& between);
    int32_t given_token(size_t i, bool held) const;
    void set_inputs();
    void measure_step(StepResult& result);
    void take_step(StepResult& result, const std::vector<int32_t>& chosen);
    void report(StepResult& result);
    bool is_stable(const std::vector<int32_t>& draft);
    size_t end_of(const std::vector<int32_t>& draft) const;
    void trim(const StepResult& result);
    void finish_canvas(StepResult& result);
    bool is_full(size_t n_more) const;

    std::shared_ptr<const Model> model_;
    int32_t n_ctx_;
    ggml_type kv_type_;
    KvCache cache_;
    std::unique_ptr<ImatrixCollector> imatrix_;
    CanvasState canvas_state_;
    Denoiser denoiser_;
    GraphExecutor executor_;
    std::vector<int32_t> tokens_;
    mutable std::mutex tokens_mutex_;  // they may be asked for while a thread computes
    std::atomic<int64_t> n_encoded_{0};
    std::unique_ptr<Generation> generation_;
    std::atomic<bool> cancel_{false};
    mutable std::atomic<bool> in_use_{false};
};

}  // namespace pydiffusion
