/* What every kernel shares: bfloat16, which C has no type for. */

#ifndef AUTODEPLOY_NATIVE_H
#define AUTODEPLOY_NATIVE_H

#include <stdint.h>
#include <string.h>

/* Waking threads costs as much as working on about this many numbers. */
enum { WORTH_THREADS = 65536 };

static inline float widened(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest, ties to even, as torch rounds; NaN stays NaN. */
static inline uint16_t narrowed(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

#endif
