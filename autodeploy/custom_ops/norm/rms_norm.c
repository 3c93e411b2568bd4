/* rms_norm on the CPU: each row is read from memory once and written once. */

#include <math.h>
#include <stdint.h>

#include "native.h"

/* Filled by native_cpu.py in this order. Strides are in elements; `out` is contiguous. */
typedef struct {
    const void *x, *weight; /* weight may be null */
    void *out;
    int64_t outer, inner, width, outer_stride, inner_stride;
    int64_t is_bf16, cast_before_weight, threads;
    double eps, offset;
} Call;

static void wide_row(const Call *c, const float *x, float *restrict out)
{
    const float *weight = c->weight, offset = (float)c->offset;
    float squares = 0.0f;
    for (int64_t i = 0; i < c->width; i++) squares += x[i] * x[i];
    const float scale = 1.0f / sqrtf(squares / (float)c->width + (float)c->eps);
    if (weight)
        for (int64_t i = 0; i < c->width; i++) out[i] = (offset + weight[i]) * (x[i] * scale);
    else
        for (int64_t i = 0; i < c->width; i++) out[i] = x[i] * scale;
}

/* Rounds wherever the op's definition does. */
static void narrow_row(const Call *c, const uint16_t *x, uint16_t *restrict out)
{
    const uint16_t *weight = c->weight;
    const float offset = (float)c->offset;
    float squares = 0.0f;
    for (int64_t i = 0; i < c->width; i++) squares += widened(x[i]) * widened(x[i]);
    const float scale = 1.0f / sqrtf(squares / (float)c->width + (float)c->eps);
    if (!weight)
        for (int64_t i = 0; i < c->width; i++) out[i] = narrowed(widened(x[i]) * scale);
    else if (c->cast_before_weight)
        for (int64_t i = 0; i < c->width; i++) {
            const float factor = widened(narrowed(offset + widened(weight[i])));
            out[i] = narrowed(factor * widened(narrowed(widened(x[i]) * scale)));
        }
    else
        for (int64_t i = 0; i < c->width; i++)
            out[i] = narrowed((offset + widened(weight[i])) * (widened(x[i]) * scale));
}

int rms_norm(const Call *c)
{
    const int64_t rows = c->outer * c->inner;
#pragma omp parallel for num_threads((int)c->threads) schedule(static) \
    if (c->threads > 1 && rows * c->width > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t from = row / c->inner * c->outer_stride + row % c->inner * c->inner_stride;
        if (c->is_bf16)
            narrow_row(c, (const uint16_t *)c->x + from, (uint16_t *)c->out + row * c->width);
        else wide_row(c, (const float *)c->x + from, (float *)c->out + row * c->width);
    }
    return 0;
}
