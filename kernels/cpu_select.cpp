// Selection on CPU: the moments of every tile, and the best tiles of every row of scores.

#include "cpu_common.h"

namespace veda {

// Mirrored by `_Statistics` in cpu_select.py. Results are (B, h, n, D) float32.
struct Statistics {
    Tensor x;
    const uint8_t* valid;  // (B, N), rows to count, or null
    const int32_t* rows;  // (n, S) token positions, -1 for none
    const int64_t* heads;  // (h,) heads of x
    float *count;  // (B, h, n)
    float *mean, *second, *variance;
    float *highest, *lowest;  // or null
    int64_t dtype, batches, head_count, tokens, head_dim, tiles, tile_size, threads;
};

class StatisticsWorker {
  public:
    explicit StatisticsWorker(const Statistics& job) : s(job), tile(s.tile_size * s.head_dim) {}

    void run(int64_t number) {
        const int64_t d = s.head_dim;
        const int64_t index = number % s.tiles, head = number / s.tiles % s.head_count;
        const int64_t batch = number / s.tiles / s.head_count;
        const int64_t count = load_tile(batch, s.heads[head], s.rows + index * s.tile_size);
        s.count[number] = float(count);
        float *mean = s.mean + number * d, *second = s.second + number * d;
        float* variance = s.variance + number * d;
        std::fill(mean, mean + d, 0.0f);
        std::fill(second, second + d, 0.0f);
        std::fill(variance, variance + d, 0.0f);
        for (int64_t i = 0; i < count; i++) {
            const float* row = &tile[i * d];
            for (int64_t e = 0; e < d; e++) {
                mean[e] += row[e];
                second[e] += row[e] * row[e];
            }
        }
        const float share = 1.0f / float(std::max(count, int64_t(1)));
        for (int64_t e = 0; e < d; e++) {
            mean[e] *= share;
            second[e] *= share;
        }
        // E[x^2] - E[x]^2 would cancel: a second pass
        for (int64_t i = 0; i < count; i++) {
            const float* row = &tile[i * d];
            for (int64_t e = 0; e < d; e++) variance[e] += (row[e] - mean[e]) * (row[e] - mean[e]);
        }
        for (int64_t e = 0; e < d; e++) variance[e] *= share;
        if (s.highest) extremes(count, s.highest + number * d, s.lowest + number * d);
    }

  private:
    // Gathers the counted rows, widened; returns how many.
    int64_t load_tile(int64_t batch, int64_t head, const int32_t* tokens) {
        const char* base = head_of(s.x, s.dtype, batch, head);
        const uint8_t* valid = s.valid ? s.valid + batch * s.tokens : nullptr;
        int64_t count = 0;
        for (int64_t i = 0; i < s.tile_size && tokens[i] >= 0; i++) {
            if (valid && !valid[tokens[i]]) continue;
            widen_row(s.x, base, s.dtype, tokens[i], s.head_dim, &tile[count * s.head_dim]);
            count++;
        }
        return count;
    }

    void extremes(int64_t count, float* highest, float* lowest) {
        const int64_t d = s.head_dim;
        for (int64_t e = 0; e < d; e++) highest[e] = lowest[e] = count ? tile[e] : 0.0f;
        for (int64_t i = 1; i < count; i++) {
            const float* row = &tile[i * d];
            for (int64_t e = 0; e < d; e++) {
                highest[e] = row[e] > highest[e] ? row[e] : highest[e];
                lowest[e] = row[e] < lowest[e] ? row[e] : lowest[e];
            }
        }
    }

    const Statistics& s;
    std::vector<float> tile;
};

// Mirrored by `_Choice` in cpu_select.py.
struct Choice {
    const float* scores;  // (B, h, n, n)
    const int32_t* budgets;  // (h, n, V)
    const int64_t* starts;  // (V + 1,)
    const int64_t* heads;  // (h,)
    int32_t* indices;  // (B, H, Q, K)
    int32_t* counts;  // (B, H, Q)
    int64_t batches, head_count, tiles, segments, all_heads, list_rows, list_width, threads;
};

class ChoiceWorker {
  public:
    explicit ChoiceWorker(const Choice& job) : c(job), ranked(c.tiles) {}

    // One query tile: the best of each segment, own tile first, ties to the lower number.
    void run(int64_t number) {
        const int64_t tile = number % c.tiles, head = number / c.tiles % c.head_count;
        const int64_t batch = number / c.tiles / c.head_count;
        const float* scores = c.scores + number * c.tiles;
        const int32_t* budgets = c.budgets + (head * c.tiles + tile) * c.segments;
        const int64_t list = (batch * c.all_heads + c.heads[head]) * c.list_rows + tile;
        int32_t* kept = c.indices + list * c.list_width;
        int64_t count = 0;
        for (int64_t segment = 0; segment < c.segments; segment++) {
            const int64_t start = c.starts[segment], n = c.starts[segment + 1] - start;
            const int64_t budget = std::min(int64_t(budgets[segment]), n);
            for (int64_t i = 0; i < n; i++) ranked[i] = key(scores[start + i], start + i, tile);
            if (budget < n)
                std::nth_element(ranked.begin(), ranked.begin() + budget, ranked.begin() + n,
                                 std::greater<uint64_t>());
            const int64_t first = count;
            for (int64_t i = 0; i < budget; i++) {
                const int32_t index = int32_t(~uint32_t(ranked[i]));
                if (scores[index] > MINUS_INFINITY) kept[count++] = index;  // false for NaN
            }
            std::sort(kept + first, kept + count);
        }
        c.counts[list] = int32_t(count);
    }

  private:
    // Greater for better: the score in an order that integers have, then the lower number.
    static uint64_t key(float score, int64_t index, int64_t own) {
        uint32_t bits;
        if (index == own && score > MINUS_INFINITY) score = std::numeric_limits<float>::infinity();
        score += 0.0f;  // -0 ties with 0
        std::memcpy(&bits, &score, 4);
        bits = bits >> 31 ? ~bits : bits | 0x80000000u;
        if (std::isnan(score)) bits = 0xffffffffu;  // as torch sorts it
        return uint64_t(bits) << 32 | uint32_t(~uint32_t(index));
    }

    const Choice& c;
    std::vector<uint64_t> ranked;
};

}  // namespace veda

extern "C" void veda_statistics(const veda::Statistics* job) {
    veda::run_tasks<veda::StatisticsWorker>(job->batches * job->head_count * job->tiles,
                                            job->threads, *job);
}

extern "C" void veda_choose(const veda::Choice* job) {
    veda::run_tasks<veda::ChoiceWorker>(job->batches * job->head_count * job->tiles, job->threads,
                                        *job);
}
