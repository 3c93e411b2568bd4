/* rope on the CPU: queries and keys rotated in one call, out of place. */

#include <stdint.h>

#include "native.h"

/* Filled by native_cpu.py in this order. Strides are in elements. */
typedef struct {
    const void *q, *k, *cos, *sin;
    void *q_out, *k_out;
    int64_t tokens, q_heads, k_heads, width, rotated;
    int64_t q_token, q_head, k_token, k_head, cos_token, sin_token;
    int64_t heads_first, interleaved, is_bf16, threads;
} Call;

/* a * c + b * s; in bfloat16 each product is rounded, as in the op's definition. */
static inline float turned_wide(float a, float c, float b, float s) { return a * c + b * s; }

static inline uint16_t turned_narrow(uint16_t a, uint16_t c, float b, uint16_t s)
{
    return narrowed(widened(narrowed(widened(a) * widened(c))) + widened(narrowed(b * widened(s))));
}

static void wide_head(const Call *c, const float *x, const float *cos, const float *sin,
                      float *restrict out)
{
    const int64_t half = c->rotated / 2;
    if (c->interleaved)
        for (int64_t i = 0; i < half; i++) {
            out[2 * i] = turned_wide(x[2 * i], cos[i], -x[2 * i + 1], sin[i]);
            out[2 * i + 1] = turned_wide(x[2 * i + 1], cos[i], x[2 * i], sin[i]);
        }
    else
        for (int64_t i = 0; i < half; i++) {
            out[i] = turned_wide(x[i], cos[i], -x[i + half], sin[i]);
            out[i + half] = turned_wide(x[i + half], cos[i + half], x[i], sin[i + half]);
        }
    memcpy(out + c->rotated, x + c->rotated, (c->width - c->rotated) * sizeof(float));
}

static void narrow_head(const Call *c, const uint16_t *x, const uint16_t *cos, const uint16_t *sin,
                        uint16_t *restrict out)
{
    const int64_t half = c->rotated / 2;
    if (c->interleaved)
        for (int64_t i = 0; i < half; i++) {
            out[2 * i] = turned_narrow(x[2 * i], cos[i], -widened(x[2 * i + 1]), sin[i]);
            out[2 * i + 1] = turned_narrow(x[2 * i + 1], cos[i], widened(x[2 * i]), sin[i]);
        }
    else
        for (int64_t i = 0; i < half; i++) {
            out[i] = turned_narrow(x[i], cos[i], -widened(x[i + half]), sin[i]);
            out[i + half] = turned_narrow(x[i + half], cos[i + half], widened(x[i]), sin[i + half]);
        }
    memcpy(out + c->rotated, x + c->rotated, (c->width - c->rotated) * sizeof(uint16_t));
}

static void rotate(const Call *c, const void *x, int64_t heads, int64_t token_stride,
                   int64_t head_stride, int64_t t, void *out)
{
    for (int64_t h = 0; h < heads; h++) {
        const int64_t from = t * token_stride + h * head_stride;
        const int64_t to = (c->heads_first ? h * c->tokens + t : t * heads + h) * c->width;
        if (c->is_bf16)
            narrow_head(c, (const uint16_t *)x + from, (const uint16_t *)c->cos + t * c->cos_token,
                        (const uint16_t *)c->sin + t * c->sin_token, (uint16_t *)out + to);
        else
            wide_head(c, (const float *)x + from, (const float *)c->cos + t * c->cos_token,
                      (const float *)c->sin + t * c->sin_token, (float *)out + to);
    }
}

int rope(const Call *c)
{
#pragma omp parallel for num_threads((int)c->threads) schedule(static) \
    if (c->threads > 1 && c->tokens * (c->q_heads + c->k_heads) * c->width > WORTH_THREADS)
    for (int64_t t = 0; t < c->tokens; t++) {
        rotate(c, c->q, c->q_heads, c->q_token, c->q_head, t, c->q_out);
        rotate(c, c->k, c->k_heads, c->k_token, c->k_head, t, c->k_out);
    }
    return 0;
}
