// Tile-sparse attention on CPU: each query tile against a list of key rows, with online softmax.
//
// Queries live in vector lanes: scores are computed transposed, (keys x queries), so softmax needs
// no operation across lanes, and single elements of K and V rows are broadcast. K and V are read
// by row index where they lie; nothing is permuted. AVX512-BF16 machines multiply bfloat16 pairs
// directly; other half-precision inputs are widened one chunk of keys at a time.

#include "cpu_common.h"
#include "cpu_products.h"

namespace veda {

// Mirrored by `_Call` in cpu_native.py.
struct Call {
    Tensor q, k, v;
    void* out;  // (B, Nq, H, D): bfloat16 for bfloat16 inputs, else float32
    float* lse;  // (B, H, Nq)
    const uint8_t* key_valid;  // (B, Nk) or null
    const int32_t* const* tile_rows;  // keys, per head (n_h, S), ragged tiles end in -1
    const int32_t* const* query_rows;  // the same tokens among the queries
    const int64_t* tile_counts;  // per head n_h
    const int32_t* extra;  // keys in no tile
    const int32_t* extra_queries;  // queries in no tile
    const int32_t* indices;  // (B, H, Q, K)
    const int32_t* counts;  // (B, H, Q)
    int64_t dtype, batches, heads, kv_heads, queries, keys, head_dim, tile_size;
    int64_t extra_count, extra_query_count, list_rows, list_width, threads;
    double scale;
};

struct Task {
    int64_t batch, head;
    const int32_t* queries;  // rows of q
    int64_t query_count;
    int64_t tile;  // -1 for extra queries, which attend to every key
};

struct Job {
    const Call& call;
    const std::vector<Task>& tasks;
};

class Worker {
  public:
    explicit Worker(const Job& job)
        : c(job.call),
          tasks(job.tasks),
          groups((std::max(job.call.tile_size, int64_t(CHUNK)) + LANES - 1) / LANES) {
        const int64_t d = c.head_dim;
        const bool dense_rows = c.k.column == 1 && c.v.column == 1;
        direct = c.dtype == FLOAT32 && dense_rows;
        pairs = VEDA_BF16_PAIRS && c.dtype == BFLOAT16 && dense_rows && d % 2 == 0;
        keys.resize(c.keys);
        q.resize(groups * d * LANES);
        o.resize(groups * d * LANES);
        top.resize(groups * LANES);
        sum.resize(groups * LANES);
        scores.resize(CHUNK * LANES);
        row.resize(d);
        if (pairs) {
            v_pairs.resize(CHUNK / 2 * d);
            p_pairs.resize(CHUNK / 2 * LANES);
        } else if (!direct) {
            k_wide.resize(CHUNK * d);
            v_wide.resize(CHUNK * d);
        }
    }

    void run(int64_t number) {
        const Task& task = tasks[number];
        const int64_t kv_head = task.head / (c.heads / c.kv_heads);
        q_base = head_of(c.q, c.dtype, task.batch, task.head);
        k_base = head_of(c.k, c.dtype, task.batch, kv_head);
        v_base = head_of(c.v, c.dtype, task.batch, kv_head);
        const int64_t count = list_keys(task);
        used_groups = (task.query_count + LANES - 1) / LANES;
        load_queries(task);
        for (int64_t first = 0; first < count; first += CHUNK)
            step(keys.data() + first, std::min(int64_t(CHUNK), count - first));
        write(task);
    }

  private:
    int64_t list_keys(const Task& task) {
        const uint8_t* valid = c.key_valid ? c.key_valid + task.batch * c.keys : nullptr;
        int64_t count = 0;
        if (task.tile < 0) {
            for (int64_t token = 0; token < c.keys; token++) {
                if (!valid || valid[token]) keys[count++] = int32_t(token);
            }
            return count;
        }
        for (int64_t e = 0; e < c.extra_count; e++) {
            if (!valid || valid[c.extra[e]]) keys[count++] = c.extra[e];
        }
        const int64_t list = (task.batch * c.heads + task.head) * c.list_rows + task.tile;
        const int32_t* kept = c.indices + list * c.list_width;
        const int64_t count_kept = c.counts[list];
        const bool everything = count_kept == c.tile_counts[task.head];  // has no list
        for (int64_t i = 0; i < count_kept; i++) {
            const int64_t tile = everything ? i : kept[i];
            const int32_t* tokens = c.tile_rows[task.head] + tile * c.tile_size;
            for (int64_t s = 0; s < c.tile_size && tokens[s] >= 0; s++) {
                if (!valid || valid[tokens[s]]) keys[count++] = tokens[s];
            }
        }
        return count;
    }

    void load_queries(const Task& task) {
        const int64_t d = c.head_dim;
        const float factor = float(c.scale) * LOG2E;
        std::fill(q.begin(), q.begin() + used_groups * d * LANES, 0.0f);
        std::fill(o.begin(), o.begin() + used_groups * d * LANES, 0.0f);
        std::fill(top.begin(), top.end(), MINUS_INFINITY);
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t i = 0; i < task.query_count; i++) {
            float* panel = q.data() + (i / LANES) * d * LANES;
            const int64_t lane = i % LANES;
            if (pairs) {
                const uint16_t* from =
                    reinterpret_cast<const uint16_t*>(q_base) + task.queries[i] * c.q.row;
                uint16_t* to = reinterpret_cast<uint16_t*>(panel);
                for (int64_t e = 0; e < d; e++)
                    to[(e / 2 * LANES + lane) * 2 + e % 2] = from[e * c.q.column];
            } else {
                widen_row(c.q, q_base, c.dtype, task.queries[i], d, row.data());
                for (int64_t e = 0; e < d; e++) panel[e * LANES + lane] = row[e] * factor;
            }
        }
    }

    // All queries against up to CHUNK keys.
    void step(const int32_t* tokens, int64_t count) {
        if (pairs) {
            point_to_pairs(tokens, count);
        } else if (direct) {
            point_to_rows(tokens, count);
        } else {
            point_to_widened(tokens, count);
        }
        for (int64_t group = 0; group < used_groups; group++) step_group(group, count);
    }

    // A last, partial block repeats its last row; what it computes there is not used.
    static int64_t padded(int64_t count) { return (count + BLOCK - 1) / BLOCK * BLOCK; }

    void point_to_rows(const int32_t* tokens, int64_t count) {
        for (int64_t i = 0; i < padded(count); i++) {
            const int64_t token = tokens[std::min(i, count - 1)];
            k_rows[i] = reinterpret_cast<const float*>(k_base) + token * c.k.row;
            v_rows[i] = reinterpret_cast<const float*>(v_base) + token * c.v.row;
        }
    }

    void point_to_widened(const int32_t* tokens, int64_t count) {
        const int64_t d = c.head_dim;
        for (int64_t i = 0; i < count; i++) {
            widen_row(c.k, k_base, c.dtype, tokens[i], d, &k_wide[i * d]);
            widen_row(c.v, v_base, c.dtype, tokens[i], d, &v_wide[i * d]);
        }
        for (int64_t i = 0; i < padded(count); i++) {
            k_rows[i] = &k_wide[std::min(i, count - 1) * d];
            v_rows[i] = &v_wide[std::min(i, count - 1) * d];
        }
    }

    void point_to_pairs(const int32_t* tokens, int64_t count) {
        const int64_t d = c.head_dim;
        for (int64_t i = 0; i < padded(count); i++) {
            const int64_t token = tokens[std::min(i, count - 1)];
            k_rows16[i] = reinterpret_cast<const uint16_t*>(k_base) + token * c.k.row;
        }
        const uint16_t* base = reinterpret_cast<const uint16_t*>(v_base);
        for (int64_t i = 0; i < count; i += 2) {
            const uint16_t* a = base + tokens[i] * c.v.row;
            uint32_t* to = &v_pairs[i / 2 * d];
            if (i + 1 < count) {
                const uint16_t* b = base + tokens[i + 1] * c.v.row;
                for (int64_t e = 0; e < d; e++) to[e] = a[e] | uint32_t(b[e]) << 16;
            } else {
                for (int64_t e = 0; e < d; e++) to[e] = a[e];
            }
        }
    }

    void step_group(int64_t group, int64_t count) {
        const int64_t d = c.head_dim;
        const float* q_panel = q.data() + group * d * LANES;
        float* o_panel = o.data() + group * d * LANES;
        float* s = scores.data();
        const Floats before[2] = {load(&top[group * LANES]), load(&top[group * LANES + WIDTH])};
        Floats peak[2] = {before[0], before[1]};
        for (int64_t i = 0; i < count; i += BLOCK) {
            const int used = int(std::min(int64_t(BLOCK), count - i));
#if VEDA_BF16_PAIRS
            if (pairs) {
                score_block_pairs(k_rows16 + i, reinterpret_cast<const uint32_t*>(q_panel), d / 2,
                                  float(c.scale) * LOG2E, s + i * LANES, peak, used);
                continue;
            }
#endif
            score_block(k_rows + i, q_panel, d, s + i * LANES, peak, used);
        }
        const Floats fade[2] = {exp2_nonpositive(before[0] - peak[0]),
                                exp2_nonpositive(before[1] - peak[1])};
        store(&top[group * LANES], peak[0]);
        store(&top[group * LANES + WIDTH], peak[1]);
#if VEDA_BF16_PAIRS
        if (pairs) {
            add_to_sum(group, fade, exponentials_in_pairs(count, peak));
            const uint32_t *v = v_pairs.data(), *p = p_pairs.data();
            const int64_t n = (count + 1) / 2;
            int64_t d0 = 0;
            for (; d0 + BLOCK <= d; d0 += BLOCK)
                value_block_pairs<BLOCK>(v, n, p, d0, d, fade, o_panel);
            for (; d0 < d; d0++) value_block_pairs<1>(v, n, p, d0, d, fade, o_panel);
            return;
        }
#endif
        add_to_sum(group, fade, exponentials(count, peak));
        int64_t d0 = 0;
        for (; d0 + BLOCK <= d; d0 += BLOCK)
            value_block<BLOCK>(v_rows, count, s, d0, fade, o_panel);
        for (; d0 < d; d0++) value_block<1>(v_rows, count, s, d0, fade, o_panel);
    }

    struct Sums {
        Floats half[2] = {};
    };

    // Turns scores into 2^(score - peak), in place; returns their sums over the keys.
    Sums exponentials(int64_t count, const Floats peak[2]) {
        Sums total;
        for (int64_t i = 0; i < count; i++) {
            for (int half = 0; half < 2; half++) {
                float* at = &scores[i * LANES + half * WIDTH];
                const Floats p = exp2_nonpositive(load(at) - peak[half]);
                total.half[half] += p;
                store(at, p);
            }
        }
        return total;
    }

#if VEDA_BF16_PAIRS
    // The same into `p_pairs`, rounded; a missing partner of the last key is 0.
    Sums exponentials_in_pairs(int64_t count, const Floats peak[2]) {
        Sums total;
        for (int64_t i = 0; i < count; i += 2) {
            for (int half = 0; half < 2; half++) {
                const float* from = &scores[i * LANES + half * WIDTH];
                const Floats a = exp2_nonpositive(load(from) - peak[half]);
                Floats b = {};
                if (i + 1 < count) b = exp2_nonpositive(load(from + LANES) - peak[half]);
                total.half[half] += a + b;
                const Words both = high_half(a) >> 16 | (high_half(b) & 0xffff0000u);
                std::memcpy(&p_pairs[i / 2 * LANES + half * WIDTH], &both, sizeof both);
            }
        }
        return total;
    }
#endif

    void add_to_sum(int64_t group, const Floats fade[2], const Sums& total) {
        for (int half = 0; half < 2; half++) {
            float* at = &sum[group * LANES + half * WIDTH];
            store(at, load(at) * fade[half] + total.half[half]);
        }
    }

    void write(const Task& task) {
        const int64_t d = c.head_dim;
        for (int64_t i = 0; i < task.query_count; i++) {
            const int64_t lane = i % LANES, token = task.queries[i];
            const float* panel = o.data() + (i / LANES) * d * LANES + lane;
            const float total = sum[i];  // 0 only where no key was listed
            const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
            const int64_t at = ((task.batch * c.queries + token) * c.heads + task.head) * d;
            if (c.dtype == BFLOAT16) {
                uint16_t* to = static_cast<uint16_t*>(c.out) + at;
                for (int64_t e = 0; e < d; e++) to[e] = narrow_bf16(panel[e * LANES] * inverse);
            } else {
                float* to = static_cast<float*>(c.out) + at;
                for (int64_t e = 0; e < d; e++) to[e] = panel[e * LANES] * inverse;
            }
            c.lse[(task.batch * c.heads + task.head) * c.queries + token] =
                total == 0.0f ? MINUS_INFINITY : top[i] * LN2 + std::log(total);
        }
    }

    const Call& c;
    const std::vector<Task>& tasks;
    const int64_t groups;
    int64_t used_groups = 0;
    bool direct, pairs;
    const char *q_base, *k_base, *v_base;
    std::vector<int32_t> keys;
    std::vector<float> q, o, top, sum, scores, row, k_wide, v_wide;
    std::vector<uint32_t> v_pairs, p_pairs;
    const float* k_rows[CHUNK];
    const float* v_rows[CHUNK];
    const uint16_t* k_rows16[CHUNK];
};

std::vector<Task> list_tasks(const Call& c) {
    std::vector<Task> tasks;
    // extra queries see every key and take longest: first, so that no thread ends on one
    for (int64_t b = 0; b < c.batches; b++)
        for (int64_t h = 0; h < c.heads; h++)
            for (int64_t e = 0; e < c.extra_query_count; e += CHUNK)
                tasks.push_back({b, h, c.extra_queries + e,
                                 std::min(int64_t(CHUNK), c.extra_query_count - e), -1});
    for (int64_t b = 0; b < c.batches; b++)
        for (int64_t h = 0; h < c.heads; h++)
            for (int64_t t = 0; t < c.tile_counts[h]; t++) {
                const int32_t* rows = c.query_rows[h] + t * c.tile_size;
                const int32_t* end = std::find(rows, rows + c.tile_size, -1);
                tasks.push_back({b, h, rows, end - rows, t});
            }
    return tasks;
}

}  // namespace veda

extern "C" void veda_attend(const veda::Call* call) {
    const std::vector<veda::Task> tasks = veda::list_tasks(*call);
    const veda::Job job{*call, tasks};
    veda::run_tasks<veda::Worker>(int64_t(tasks.size()), call->threads, job);
}
