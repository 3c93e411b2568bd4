/* Paged attention for a step's few new tokens per sequence, on the CPU.

   One unit of work is a sequence and a kv head: its keys and values are read from their pages
   once for all query heads and new tokens that share them. Every mask the op knows leaves a
   contiguous range of keys, so masked keys are never touched, and neither is unwritten memory. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int64_t sequences, kv_heads, groups, width, value_width, page_size, table_width, max_new;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head; /* strides in elements */
    int64_t window, chunk, threads, tokens;
    float scale, softcap;
} Sizes;

static inline float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float same(float x) { return x; }

/* exp for x <= 0 by 2^n times a polynomial on [-ln2/2, ln2/2]; NaN stays NaN. Relative error
   under 3e-7, and it vectorises, which the library's does not without -ffast-math. */
static inline float exponential(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    float n = rintf(clamped * 1.44269504088896341f);
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x == x ? p * power : x;
}

#define KERNEL(NAME, T, LOAD, STORE)                                                              \
    static void NAME##_unit(                                                                      \
        const Sizes *s, const T *q, T *k_cache, T *v_cache, const int32_t *cu_q,                  \
        const int32_t *kv_len, const int32_t *table, const float *sinks, const float *slopes,     \
        T *out, int64_t b, int64_t h, float *scores, float *row, float *sum)                      \
    {                                                                                             \
        const int64_t start = cu_q[b], count = cu_q[b + 1] - start, length = kv_len[b];           \
        const int64_t D = s->width, E = s->value_width, P = s->page_size, G = s->groups;          \
        const int64_t rows = count * G, first = length - count;                                   \
        const int32_t *pages = table + b * s->table_width;                                        \
        int64_t low = 0;                                                                          \
        if (s->window && first - s->window + 1 > low) low = first - s->window + 1;                \
        if (s->chunk && first / s->chunk * s->chunk > low) low = first / s->chunk * s->chunk;     \
        const int64_t span = length - low;                                                        \
        float *queries = row + D;                                                                 \
        for (int64_t r = 0; r < rows; r++) {                                                      \
            const T *from = q + (start + r / G) * s->q_token + (h * G + r % G) * s->q_head;       \
            for (int64_t d = 0; d < D; d++) queries[r * D + d] = LOAD(from[d]) * s->scale;        \
        }                                                                                         \
        for (int64_t j = low; j < length; j++) {                                                  \
            const T *key = k_cache + (((int64_t)pages[j / P] * P + j % P) * s->kv_heads + h) * D; \
            for (int64_t d = 0; d < D; d++) row[d] = LOAD(key[d]);                                \
            for (int64_t r = 0; r < rows; r++) {                                                  \
                const float *query = queries + r * D;                                             \
                float dot = 0.0f;                                                                 \
                for (int64_t d = 0; d < D; d++) dot += query[d] * row[d];                         \
                scores[r * span + j - low] = dot;                                                 \
            }                                                                                     \
        }                                                                                         \
        for (int64_t r = 0; r < rows; r++) {                                                      \
            const int64_t position = first + r / G, head = h * G + r % G;                         \
            int64_t from = 0;                                                                     \
            if (s->window && position - s->window + 1 > from) from = position - s->window + 1;    \
            if (s->chunk && position / s->chunk * s->chunk > from)                                \
                from = position / s->chunk * s->chunk;                                            \
            float *line = scores + r * span;                                                      \
            const int64_t a = from - low, z = position + 1 - low;                                 \
            if (s->softcap > 0.0f)                                                                \
                for (int64_t j = a; j < z; j++) line[j] = s->softcap * tanhf(line[j] / s->softcap); \
            if (slopes)                                                                           \
                for (int64_t j = a; j < z; j++) line[j] += slopes[head] * (float)(low + j - position); \
            float top = sinks ? sinks[head] : line[a];                                            \
            for (int64_t j = a; j < z; j++) top = line[j] > top ? line[j] : top;                  \
            float total = sinks ? exponential(sinks[head] - top) : 0.0f;                          \
            for (int64_t j = a; j < z; j++) {                                                     \
                line[j] = exponential(line[j] - top);                                             \
                total += line[j];                                                                 \
            }                                                                                     \
            const float inverse = 1.0f / total;                                                   \
            for (int64_t j = 0; j < a; j++) line[j] = 0.0f;                                       \
            for (int64_t j = a; j < z; j++) line[j] *= inverse;                                   \
            for (int64_t j = z; j < span; j++) line[j] = 0.0f;                                    \
        }                                                                                         \
        for (int64_t i = 0; i < rows * E; i++) sum[i] = 0.0f;                                     \
        for (int64_t j = low; j < length; j++) {                                                  \
            const T *value =                                                                      \
                v_cache + (((int64_t)pages[j / P] * P + j % P) * s->kv_heads + h) * E;            \
            for (int64_t e = 0; e < E; e++) row[e] = LOAD(value[e]);                              \
            for (int64_t r = 0; r < rows; r++) {                                                  \
                const float weight = scores[r * span + j - low];                                  \
                float *into = sum + r * E;                                                        \
                for (int64_t e = 0; e < E; e++) into[e] += weight * row[e];                       \
            }                                                                                     \
        }                                                                                         \
        for (int64_t r = 0; r < rows; r++) {                                                      \
            T *to = out + ((start + r / G) * s->kv_heads * G + h * G + r % G) * E;                \
            for (int64_t e = 0; e < E; e++) to[e] = STORE(sum[r * E + e]);                        \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    int NAME(                                                                                     \
        const Sizes *s, const T *q, const T *k, const T *v, T *k_cache, T *v_cache,               \
        const int32_t *cu_q, const int32_t *kv_len, const int32_t *table, const int64_t *slot,    \
        const float *sinks, const float *slopes, T *out)                                          \
    {                                                                                             \
        const int64_t D = s->width, E = s->value_width, H = s->kv_heads;                          \
        for (int64_t t = 0; t < s->tokens; t++)                                                   \
            for (int64_t h = 0; h < H; h++) {                                                     \
                memcpy(k_cache + (slot[t] * H + h) * D, k + t * s->k_token + h * s->k_head,       \
                       D * sizeof(T));                                                            \
                memcpy(v_cache + (slot[t] * H + h) * E, v + t * s->v_token + h * s->v_head,       \
                       E * sizeof(T));                                                            \
            }                                                                                     \
        int64_t longest = 0;                                                                      \
        for (int64_t b = 0; b < s->sequences; b++)                                                \
            if (kv_len[b] > longest) longest = kv_len[b];                                         \
        const int64_t most = s->max_new * s->groups, wide = D > E ? D : E;                        \
        int failed = 0;                                                                           \
        _Pragma("omp parallel num_threads((int)s->threads)")                                      \
        {                                                                                         \
            float *memory = malloc(sizeof(float) * (most * (longest + D + E) + wide + D));        \
            if (!memory) failed = 1;                                                              \
            _Pragma("omp for schedule(dynamic, 1)")                                               \
            for (int64_t unit = 0; unit < s->sequences * H; unit++) {                             \
                const int64_t b = unit / H, count = cu_q[b + 1] - cu_q[b];                        \
                if (!memory || count < 1 || count > s->max_new) continue;                         \
                float *row = memory + most * (longest + E);                                       \
                NAME##_unit(s, q, k_cache, v_cache, cu_q, kv_len, table, sinks, slopes, out, b,   \
                            unit % H, memory, row + (wide - D), memory + most * longest);         \
            }                                                                                     \
            free(memory);                                                                         \
        }                                                                                         \
        return failed;                                                                            \
    }

KERNEL(paged_attention_f32, float, same, same)
KERNEL(paged_attention_bf16, uint16_t, from_bf16, to_bf16)
