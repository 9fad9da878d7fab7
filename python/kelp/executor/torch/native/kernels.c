/* The few operations of a decoding step that torch has no single operator for, in bf16 on a CPU.
 *
 * Plain C, left to the compiler to vectorise. Every function has an equivalent in torch that runs where there is no
 * compiler, and a test that compares the two. Intermediate results are rounded to bf16 where torch rounds them.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MAX_HEAD_DIM 256
#define MAX_GROUP 16
#define TILE 64
#define LANES 16
/* Below so many multiplications a second thread costs more than it brings. */
#define MIN_PARALLEL_WORK 30000

static inline float widen(uint16_t number) {
    uint32_t bits = (uint32_t)number << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* exp for arguments up to 0; Cephes' polynomial, relative error below 2e-7. */
static inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float whole = rintf(x * 1.44269504f);
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float result = 1.9875691500e-4f;
    result = result * rest + 1.3981999507e-3f;
    result = result * rest + 8.3334519073e-3f;
    result = result * rest + 4.1665795894e-2f;
    result = result * rest + 1.6666665459e-1f;
    result = result * rest + 5.0000001201e-1f;
    result = result * rest * rest + rest + 1.0f;
    int32_t exponent = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &exponent, sizeof power);
    return result * power;
}

typedef struct {
    const uint16_t *pool; /* [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim] */
    int64_t num_layers, num_kv_heads, block_size, head_dim;
    int64_t group; /* query heads per KV head */
    float scale;
} Shape;

typedef struct {
    const int64_t *tables;  /* [num_tables, table_stride] block ids */
    const int64_t *row_table; /* [num_rows] */
    const int64_t *ends;      /* [num_rows] positions below this are seen */
    int64_t num_rows, table_stride, work;
    int64_t num_threads;
} Plan;

static inline __attribute__((always_inline)) void attend_head_of(const Shape *shape, const int64_t dim,
                                                                  const int64_t group, const int64_t *table,
                                                                  int64_t begin, int64_t end, int64_t first_block_part,
                                                                  const uint16_t *query, uint16_t *out) {
    const int64_t block_size = shape->block_size;
    const int64_t head_size = block_size * dim;
    const int64_t block_stride = shape->num_layers * 2 * shape->num_kv_heads * head_size;
    const int64_t value_offset = shape->num_kv_heads * head_size;
    float wide_query[MAX_GROUP][MAX_HEAD_DIM], sum[MAX_GROUP][MAX_HEAD_DIM];
    float best[MAX_GROUP], total[MAX_GROUP], weights[MAX_GROUP][TILE];

    for (int64_t g = 0; g < group; g++) {
        best[g] = -INFINITY;
        total[g] = 0.0f;
        for (int64_t d = 0; d < dim; d++) {
            wide_query[g][d] = widen(query[g * dim + d]) * shape->scale;
            sum[g][d] = 0.0f;
        }
    }
    for (int64_t tile = begin; tile < end; tile += TILE) {
        const int64_t tile_end = tile + TILE < end ? tile + TILE : end;
        float highest[MAX_GROUP];
        for (int64_t g = 0; g < group; g++) highest[g] = best[g];
        for (int64_t position = tile; position < tile_end; position++) {
            const uint16_t *key = shape->pool + table[position / block_size] * block_stride + first_block_part +
                                  position % block_size * dim;
            float wide_key[MAX_HEAD_DIM];
            for (int64_t d = 0; d < dim; d++) wide_key[d] = widen(key[d]);
            for (int64_t g = 0; g < group; g++) {
                float score = 0.0f;
                for (int64_t d = 0; d < dim; d++) score += wide_query[g][d] * wide_key[d];
                weights[g][position - tile] = score;
                highest[g] = score > highest[g] ? score : highest[g];
            }
        }
        for (int64_t g = 0; g < group; g++) {
            const float shrink = best[g] == -INFINITY ? 0.0f : exp_negative(best[g] - highest[g]);
            float added = 0.0f;
            for (int64_t i = 0; i < tile_end - tile; i++) {
                weights[g][i] = exp_negative(weights[g][i] - highest[g]);
                added += weights[g][i];
            }
            best[g] = highest[g];
            total[g] = total[g] * shrink + added;
            for (int64_t d = 0; d < dim; d++) sum[g][d] *= shrink;
        }
        for (int64_t position = tile; position < tile_end; position++) {
            const uint16_t *value = shape->pool + table[position / block_size] * block_stride + first_block_part +
                                    value_offset + position % block_size * dim;
            float wide_value[MAX_HEAD_DIM];
            for (int64_t d = 0; d < dim; d++) wide_value[d] = widen(value[d]);
            for (int64_t g = 0; g < group; g++) {
                const float weight = weights[g][position - tile];
                for (int64_t d = 0; d < dim; d++) sum[g][d] += weight * wide_value[d];
            }
        }
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t d = 0; d < dim; d++) out[g * dim + d] = narrow(sum[g][d] / total[g]);
}

/* The sizes of common models as constants, so that the compiler can keep a head's row in registers. */
static void attend_head(const Shape *shape, const int64_t *table, int64_t begin, int64_t end, int64_t first_block_part,
                        const uint16_t *query, uint16_t *out) {
    const int64_t dim = shape->head_dim, group = shape->group;
#define CASE(DIM, GROUP) \
    if (dim == DIM && group == GROUP) { \
        attend_head_of(shape, DIM, GROUP, table, begin, end, first_block_part, query, out); \
        return; \
    }
    CASE(64, 1) CASE(64, 3) CASE(64, 4) CASE(64, 7) CASE(64, 8) CASE(128, 1) CASE(128, 4) CASE(128, 7) CASE(128, 8)
#undef CASE
    attend_head_of(shape, dim, group, table, begin, end, first_block_part, query, out);
}

/* Each row's query heads over its sequence's KV. `query` rows are `query_stride` numbers apart, `out` is dense;
 * `window` 0 sees all. */
void kelp_attend(const Shape *shape, const Plan *plan, int64_t layer, int64_t window, const uint16_t *query,
                 int64_t query_stride, uint16_t *out) {
    const int64_t heads = shape->num_kv_heads, group_size = shape->group * shape->head_dim;
    const int64_t layer_part = layer * 2 * heads * shape->block_size * shape->head_dim;
#pragma omp parallel for schedule(dynamic, 1) num_threads(plan->num_threads) if (plan->work > MIN_PARALLEL_WORK)
    for (int64_t task = 0; task < plan->num_rows * heads; task++) {
        const int64_t row = task / heads, head = task % heads, end = plan->ends[row];
        const int64_t begin = window > 0 && end > window ? end - window : 0;
        attend_head(shape, plan->tables + plan->row_table[row] * plan->table_stride, begin, end,
                    layer_part + head * shape->block_size * shape->head_dim,
                    query + row * query_stride + head * group_size, out + (row * heads + head) * group_size);
    }
}

/* out = weight * round(x / rms(x)), rows of `size` numbers. */
void kelp_rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *out, int64_t num_rows, int64_t size,
                   float epsilon, int64_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows * size > MIN_PARALLEL_WORK)
    for (int64_t row = 0; row < num_rows; row++) {
        const uint16_t *from = x + row * size;
        uint16_t *to = out + row * size;
        float squares = 0.0f;
        for (int64_t i = 0; i < size; i++) squares += widen(from[i]) * widen(from[i]);
        const float factor = 1.0f / sqrtf(squares / (float)size + epsilon);
        for (int64_t i = 0; i < size; i++) to[i] = narrow(widen(weight[i]) * widen(narrow(widen(from[i]) * factor)));
    }
}

/* Rotates the first `num_heads` heads of each row in place: x * cos + swapped halves * sin. `cos` and `sin` have one
 * row of `dim` per row of x; the first half of the sines is negated. */
void kelp_rotate(uint16_t *x, const uint16_t *cos, const uint16_t *sin, int64_t num_rows, int64_t row_stride,
                 int64_t num_heads, int64_t dim, int64_t num_threads) {
    const int64_t half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows * num_heads * dim > MIN_PARALLEL_WORK)
    for (int64_t row = 0; row < num_rows; row++) {
        const uint16_t *row_cos = cos + row * dim, *row_sin = sin + row * dim;
        for (int64_t head = 0; head < num_heads; head++) {
            uint16_t *low = x + row * row_stride + head * dim, *high = low + half;
            for (int64_t i = 0; i < half; i++) {
                const float a = widen(low[i]), b = widen(high[i]);
                const float new_a = widen(narrow(a * widen(row_cos[i]))) + widen(narrow(b * widen(row_sin[i])));
                const float new_b =
                    widen(narrow(b * widen(row_cos[half + i]))) + widen(narrow(a * widen(row_sin[half + i])));
                low[i] = narrow(new_a);
                high[i] = narrow(new_b);
            }
        }
    }
}

/* out = silu(gate) * up, where each row of x holds gate, then up. */
void kelp_silu_multiply(const uint16_t *x, uint16_t *out, int64_t num_rows, int64_t size, int64_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows * size > MIN_PARALLEL_WORK)
    for (int64_t row = 0; row < num_rows; row++) {
        const uint16_t *gate = x + row * 2 * size, *up = gate + size;
        uint16_t *to = out + row * size;
        for (int64_t i = 0; i < size; i++) {
            const float value = widen(gate[i]);
            const float decay = exp_negative(value < 0.0f ? value : -value);
            const float sigmoid = (value < 0.0f ? decay : 1.0f) / (1.0f + decay);
            to[i] = narrow(widen(narrow(value * sigmoid)) * widen(up[i]));
        }
    }
}

/* Lane by lane, because the compiler may not reorder comparisons: they are not associative with NaN. */
static inline float highest_of(const float *numbers, int64_t count) {
    float lanes[LANES], highest;
    int64_t i = 0;
    for (int64_t lane = 0; lane < LANES; lane++) lanes[lane] = numbers[0];
    for (; i + LANES <= count; i += LANES)
        for (int64_t lane = 0; lane < LANES; lane++)
            lanes[lane] = numbers[i + lane] > lanes[lane] ? numbers[i + lane] : lanes[lane];
    highest = lanes[0];
    for (int64_t lane = 1; lane < LANES; lane++) highest = lanes[lane] > highest ? lanes[lane] : highest;
    for (; i < count; i++) highest = numbers[i] > highest ? numbers[i] : highest;
    return highest;
}

/* weights = softmax(scale * scores), and 0 where a row sees nothing; overwrites the scores. Rows are those of
 * `rows_per_head` consecutive tokens, over and over, the last of which sees all `num_positions`; `window` 0 sees
 * everything before. */
void kelp_causal_softmax(float *scores, uint16_t *weights, int64_t num_rows, int64_t rows_per_head,
                         int64_t num_positions, int64_t window, float scale, int64_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows * num_positions > MIN_PARALLEL_WORK)
    for (int64_t row = 0; row < num_rows; row++) {
        const int64_t last = num_positions - rows_per_head + row % rows_per_head + 1;
        const int64_t begin = window > 0 && last > window ? last - window : 0, count = last - begin;
        float *restrict from = scores + row * num_positions + begin;
        uint16_t *restrict to = weights + row * num_positions + begin;
        const float highest = highest_of(from, count);
        float total = 0.0f;
        for (int64_t i = 0; i < count; i++) {
            const float weight = exp_negative(scale * (from[i] - highest));
            from[i] = weight;
            total += weight;
        }
        const float factor = 1.0f / total;
        for (int64_t i = 0; i < count; i++) to[i] = narrow(from[i] * factor);
        memset(to - begin, 0, (size_t)begin * sizeof *to);
        memset(to + count, 0, (size_t)(num_positions - last) * sizeof *to);
    }
}

/* Of each row of logits: the first highest one, and the log of its softmax. */
void kelp_greedy(const uint16_t *logits, int64_t *ids, float *log_probs, int64_t num_rows, int64_t vocab_size,
                 int64_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows * vocab_size > MIN_PARALLEL_WORK)
    for (int64_t row = 0; row < num_rows; row++) {
        const uint16_t *from = logits + row * vocab_size;
        float lanes[LANES], highest, total = 0.0f;
        int64_t i = 0, id = 0;
        for (int64_t lane = 0; lane < LANES; lane++) lanes[lane] = widen(from[0]);
        for (; i + LANES <= vocab_size; i += LANES)
            for (int64_t lane = 0; lane < LANES; lane++) {
                const float number = widen(from[i + lane]);
                lanes[lane] = number > lanes[lane] ? number : lanes[lane];
            }
        highest = highest_of(lanes, LANES);
        for (; i < vocab_size; i++) highest = widen(from[i]) > highest ? widen(from[i]) : highest;
        for (i = 0; i < vocab_size; i++) total += exp_negative(widen(from[i]) - highest);
        while (id < vocab_size - 1 && widen(from[id]) != highest) id++;
        ids[row] = id;
        log_probs[row] = -logf(total);
    }
}
