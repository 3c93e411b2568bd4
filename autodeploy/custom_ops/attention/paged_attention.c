/* Paged attention on the CPU: causal attention of a step's new tokens over paged keys and values.

   Two ways to do the same sums, chosen by how many query rows share a key:

   few   (decode)   Bound by memory. Keys are read in the order in which they lie, all heads of a
                    token together, and multiplied where they are.
   many  (prefill)  Bound by arithmetic. One head at a time; blocks of keys are transposed and of
                    values copied, so that both products run in a register-blocked kernel.

   Both keep a running maximum and sum per row (online softmax; Milakov and Gimelshein, 2018) and
   touch only the range of keys that a row may see: every mask of the op leaves one range. Pages
   outside of it are never read, so their table entries may be anything. All sums are float32. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

enum { BLOCK = 64, FEW_ROWS = 8, MANY_ROWS = 64, SQUARE = 16 };

#ifdef __AVX512F__
enum { LANES = 16, TILE = 8 };
#else
enum { LANES = 8, TILE = 4 };
#endif
enum { STRIP = 2 * LANES }; /* columns of one register block; divides BLOCK */

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

/* Filled by native_cpu.py in this order. Strides are in elements. */
typedef struct {
    const char *q, *k, *v;
    char *k_cache, *v_cache;
    const int32_t *cu_q, *kv_len, *block_table;
    const int64_t *slot;
    const float *sinks, *slopes; /* may be null */
    char *out;
    int64_t tokens, sequences, kv_heads, groups, width, value_width, page_size, table_width;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    int64_t key_slot, key_head, value_slot, value_head; /* strides of the caches */
    int64_t window, chunk, is_bf16, threads;
    double scale, softcap;
} Call;

typedef struct {
    const Call *call;
    const int32_t *pages;
    int64_t start, position, tokens; /* first row in q, its position, how many tokens */
    int64_t head, heads;             /* kv heads */
} Unit;

typedef struct {
    float *queries, *scores, *sums, *top, *total, *keys, *values;
} Scratch;

/* ---- numbers ---- */

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t multiple(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

/* exp of x <= 0: 2^n times a polynomial on [-ln2/2, ln2/2], relative error below 3e-7. Below -87
   it stays at e^-87. NaN stays NaN. Unlike the C library's, it vectorises. */
static inline float exponential(float x)
{
    float bounded = x < -87.0f ? -87.0f : x;
    float n = rintf(bounded * 1.44269504088896341f);
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
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

/* tanh: a series near 0, where the quotient would cancel. */
static inline float hyperbolic_tangent(float x)
{
    float size = fabsf(x), square = x * x;
    float decay = exponential(-2.0f * size);
    float far = copysignf((1.0f - decay) / (1.0f + decay), x);
    float near = x * (1.0f + square * (-0.333333333f + square * (0.133333333f
                      + square * (-0.0539682540f + square * 0.0218694885f))));
    return size < 0.3f ? near : far;
}

/* A row of n numbers as float: where it lies, or widened into `buffer`. */
static inline const float *row_of(const char *from, int64_t n, int64_t is_bf16, float *buffer)
{
    if (!is_bf16) return (const float *)from;
    const uint16_t *narrow = (const uint16_t *)from;
    for (int64_t i = 0; i < n; i++) buffer[i] = widened(narrow[i]);
    return buffer;
}

/* ---- where things lie ---- */

/* Slots of the keys low.., and of the last key in place of those from `end` on. */
static void find_slots(const Unit *u, int64_t low, int64_t end, int64_t count, int64_t *slots)
{
    const int64_t size = u->call->page_size;
    int64_t page = low / size, offset = low % size;
    for (int64_t j = 0; j < count; j++) {
        slots[j] = low + j < end ? (int64_t)u->pages[page] * size + offset : slots[j - 1];
        if (++offset == size) offset = 0, page++;
    }
}

static inline int64_t first_key(const Call *c, int64_t position)
{
    int64_t first = 0;
    if (c->window) first = larger(first, position - c->window + 1);
    if (c->chunk) first = larger(first, position / c->chunk * c->chunk);
    return first;
}

/* Queries times scale, row (head, token, group), `width` apart; sums, maxima and totals reset. */
static void begin(const Unit *u, Scratch *w, int64_t value_width)
{
    const Call *c = u->call;
    const int64_t D = c->width, G = c->groups, item = c->is_bf16 ? 2 : 4;
    const int64_t rows = u->heads * u->tokens * G;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = r / G % u->tokens, head = (u->head + r / (G * u->tokens)) * G + r % G;
        const char *from = c->q + ((u->start + token) * c->q_token + head * c->q_head) * item;
        float *to = w->queries + r * D;
        const float *query = row_of(from, D, c->is_bf16, to);
        for (int64_t d = 0; d < D; d++) to[d] = query[d] * (float)c->scale;
        w->top[r] = c->sinks ? c->sinks[head] : -INFINITY;
        w->total[r] = c->sinks ? 1.0f : 0.0f;
    }
    memset(w->sums, 0, rows * value_width * sizeof(float));
}

static void finish(const Unit *u, const Scratch *w, int64_t value_width)
{
    const Call *c = u->call;
    const int64_t E = c->value_width, G = c->groups;
    for (int64_t r = 0; r < u->heads * u->tokens * G; r++) {
        const int64_t token = r / G % u->tokens, head = (u->head + r / (G * u->tokens)) * G + r % G;
        const int64_t at = ((u->start + token) * c->kv_heads * G + head) * E;
        const float *from = w->sums + r * value_width, inverse = 1.0f / w->total[r];
        if (c->is_bf16)
            for (int64_t e = 0; e < E; e++) ((uint16_t *)c->out)[at + e] = narrowed(from[e] * inverse);
        else
            for (int64_t e = 0; e < E; e++) ((float *)c->out)[at + e] = from[e] * inverse;
    }
}

/* Scores of keys low.. of one row become weights relative to the row's running maximum; what was
   summed before is scaled to it. Weights of keys that the row may not see are 0. */
static void weigh(const Unit *u, Scratch *w, int64_t r, float *line, int64_t low, int64_t count,
                  int64_t value_width)
{
    const Call *c = u->call;
    const int64_t position = u->position + r / c->groups % u->tokens;
    const int64_t from = larger(0, smaller(count, first_key(c, position) - low));
    const int64_t to = larger(from, smaller(count, position + 1 - low));
    for (int64_t j = 0; j < from; j++) line[j] = 0.0f;
    for (int64_t j = to; j < count; j++) line[j] = 0.0f;
    if (from == to) return;
    if (c->softcap > 0.0) {
        const float cap = (float)c->softcap;
        for (int64_t j = from; j < to; j++) line[j] = cap * hyperbolic_tangent(line[j] / cap);
    }
    if (c->slopes) {
        const int64_t head = (u->head + r / (c->groups * u->tokens)) * c->groups + r % c->groups;
        const float slope = c->slopes[head];
        for (int64_t j = from; j < to; j++) line[j] += slope * (float)(low + j - position);
    }
    float top = w->top[r], total = 0.0f;
    for (int64_t j = from; j < to; j++) top = line[j] > top ? line[j] : top;
    for (int64_t j = from; j < to; j++) {
        line[j] = exponential(line[j] - top);
        total += line[j];
    }
    if (top > w->top[r]) {
        const float shrink = w->total[r] > 0.0f ? exponential(w->top[r] - top) : 0.0f;
        float *sum = w->sums + r * value_width;
        for (int64_t e = 0; e < value_width; e++) sum[e] *= shrink;
        w->total[r] *= shrink;
        w->top[r] = top;
    }
    w->total[r] += total;
}

/* ---- few rows ---- */

/* scores[0..3] = query . key for four keys at once, which hides the latency of the sums. */
static inline __attribute__((always_inline)) void four_dots(
    const float *query, const float *const *key, int64_t width, float *scores)
{
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
    for (int64_t i = 0; i < width; i++) {
        a += query[i] * key[0][i];
        b += query[i] * key[1][i];
        c += query[i] * key[2][i];
        d += query[i] * key[3][i];
    }
    scores[0] = a, scores[1] = b, scores[2] = c, scores[3] = d;
}

static inline __attribute__((always_inline)) void add_four(
    const float *weights, const float *const *value, int64_t width, float *restrict sum)
{
    const float a = weights[0], b = weights[1], c = weights[2], d = weights[3];
    for (int64_t i = 0; i < width; i++)
        sum[i] += a * value[0][i] + b * value[1][i] + c * value[2][i] + d * value[3][i];
}

/* Rows of four keys or values. The four after them are asked for: their pages may be anywhere,
   which the processor does not foresee (32 sequences of 300: 3.3 ms without, 1.6 ms with). */
static inline void four_rows(int64_t is_bf16, const char *head, int64_t stride, const int64_t *slots,
                             int64_t width, float *buffer, const float **rows)
{
    const int64_t item = is_bf16 ? 2 : 4, bytes = width * item;
    for (int64_t i = 0; i < 4; i++) {
        const char *ahead = head + slots[i + 4] * stride * item;
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte);
        const char *from = head + slots[i] * stride * item;
        rows[i] = row_of(from, width, is_bf16, buffer + i * width);
    }
}

static void attend_few(const Unit *u, Scratch *w)
{
    const Call *c = u->call;
    const int64_t D = c->width, E = c->value_width, rows = u->tokens * c->groups;
    const int64_t end = u->position + u->tokens, item = c->is_bf16 ? 2 : 4;
    int64_t slots[BLOCK + 4];
    const float *four[4];
    begin(u, w, E);
    for (int64_t low = first_key(c, u->position); low < end; low += BLOCK) {
        const int64_t count = smaller(BLOCK, end - low);
        find_slots(u, low, end, BLOCK + 4, slots);
        for (int64_t j = 0; j < count; j += 4)
            for (int64_t h = 0; h < u->heads; h++) {
                const char *keys = c->k_cache + (u->head + h) * c->key_head * item;
                four_rows(c->is_bf16, keys, c->key_slot, slots + j, D, w->keys, four);
                for (int64_t r = h * rows; r < (h + 1) * rows; r++) {
                    float *scores = w->scores + r * BLOCK + j;
                    const float *query = w->queries + r * D;
                    if (D == 64) four_dots(query, four, 64, scores);
                    else if (D == 128) four_dots(query, four, 128, scores);
                    else four_dots(query, four, D, scores);
                }
            }
        for (int64_t r = 0; r < u->heads * rows; r++)
            weigh(u, w, r, w->scores + r * BLOCK, low, multiple(count, 4), E);
        for (int64_t j = 0; j < count; j += 4)
            for (int64_t h = 0; h < u->heads; h++) {
                const char *values = c->v_cache + (u->head + h) * c->value_head * item;
                four_rows(c->is_bf16, values, c->value_slot, slots + j, E, w->values, four);
                for (int64_t r = h * rows; r < (h + 1) * rows; r++) {
                    const float *weights = w->scores + r * BLOCK + j;
                    float *sum = w->sums + r * E;
                    if (E == 64) add_four(weights, four, 64, sum);
                    else if (E == 128) add_four(weights, four, 128, sum);
                    else add_four(weights, four, E, sum);
                }
            }
    }
    finish(u, w, E);
}

/* ---- many rows ---- */

/* c += a b, for rows a multiple of TILE and columns of STRIP. */
static void add_product(int64_t rows, int64_t depth, int64_t columns, const float *a, int64_t a_row,
                        const float *b, int64_t b_row, float *c, int64_t c_row)
{
    for (int64_t n = 0; n < columns; n += STRIP)
        for (int64_t m = 0; m < rows; m += TILE) {
            Lanes sum[TILE][2];
            for (int i = 0; i < TILE; i++) {
                sum[i][0] = *(const Lanes *)(c + (m + i) * c_row + n);
                sum[i][1] = *(const Lanes *)(c + (m + i) * c_row + n + LANES);
            }
            for (int64_t k = 0; k < depth; k++) {
                const Lanes left = *(const Lanes *)(b + k * b_row + n);
                const Lanes right = *(const Lanes *)(b + k * b_row + n + LANES);
#pragma GCC unroll 8
                for (int i = 0; i < TILE; i++) {
                    const float factor = a[(m + i) * a_row + k];
                    sum[i][0] += factor * left;
                    sum[i][1] += factor * right;
                }
            }
            for (int i = 0; i < TILE; i++) {
                *(Lanes *)(c + (m + i) * c_row + n) = sum[i][0];
                *(Lanes *)(c + (m + i) * c_row + n + LANES) = sum[i][1];
            }
        }
}

/* transposed [D, BLOCK] of the keys in `slots`, a square at a time: written key by key, each number
   goes to a line of its own (8 sequences of 1024, 16 heads on one key of 576 in bfloat16: 5.8 ms so,
   4.3 ms in squares; float32 6.7 and 5.8). */
static void transpose_keys(const Call *c, int64_t head, const int64_t *slots, int64_t columns,
                           float *transposed)
{
    const int64_t D = c->width, item = c->is_bf16 ? 2 : 4;
    float square[STRIP][SQUARE];
    const float *rows[STRIP];
    for (int64_t j = 0; j < columns; j += STRIP)
        for (int64_t low = 0; low < D; low += SQUARE) {
            const int64_t count = smaller(SQUARE, D - low);
            for (int64_t i = 0; i < STRIP; i++) {
                const int64_t at = slots[j + i] * c->key_slot + head * c->key_head + low;
                rows[i] = row_of(c->k_cache + at * item, count, c->is_bf16, square[i]);
            }
            for (int64_t d = 0; d < count; d++) {
                float *to = transposed + (low + d) * BLOCK + j;
                if (c->is_bf16) for (int64_t i = 0; i < STRIP; i++) to[i] = square[i][d];
                else for (int64_t i = 0; i < STRIP; i++) to[i] = rows[i][d];
            }
        }
}

static void attend_many(const Unit *u, Scratch *w)
{
    const Call *c = u->call;
    const int64_t D = c->width, E = c->value_width, wide = multiple(E, STRIP);
    const int64_t rows = u->tokens * c->groups, padded = multiple(rows, TILE);
    const int64_t end = u->position + u->tokens, item = c->is_bf16 ? 2 : 4;
    begin(u, w, wide);
    memset(w->queries + rows * D, 0, (padded - rows) * D * sizeof(float));
    memset(w->sums + rows * wide, 0, (padded - rows) * wide * sizeof(float));
    memset(w->values, 0, BLOCK * wide * sizeof(float));
    float *transposed = w->keys + larger(D, E);
    int64_t slots[BLOCK];
    for (int64_t low = first_key(c, u->position); low < end; low += BLOCK) {
        const int64_t count = smaller(BLOCK, end - low), columns = multiple(count, STRIP);
        find_slots(u, low, end, columns, slots);
        transpose_keys(c, u->head, slots, columns, transposed);
        for (int64_t j = 0; j < columns; j++) {
            const int64_t from = slots[j] * c->value_slot + u->head * c->value_head;
            const float *value = row_of(c->v_cache + from * item, E, c->is_bf16, w->keys);
            memcpy(w->values + j * wide, value, E * sizeof(float));
        }
        memset(w->scores, 0, padded * BLOCK * sizeof(float));
        add_product(padded, D, columns, w->queries, D, transposed, BLOCK, w->scores, BLOCK);
        for (int64_t r = 0; r < rows; r++)
            weigh(u, w, r, w->scores + r * BLOCK, low, columns, wide);
        add_product(padded, count, wide, w->scores, BLOCK, w->values, wide, w->sums, wide);
    }
    finish(u, w, wide);
}

/* ---- the whole step ---- */

static void write_slots(const Call *c)
{
    const int64_t H = c->kv_heads, item = c->is_bf16 ? 2 : 4;
    const int64_t k_bytes = c->width * item, v_bytes = c->value_width * item;
    /* A region of its own: in a decode step it then costs no barrier. */
#pragma omp parallel for num_threads((int)c->threads) schedule(static) \
    if (c->threads > 1 && c->tokens * H * (c->width + c->value_width) > WORTH_THREADS)
    for (int64_t t = 0; t < c->tokens; t++)
        for (int64_t h = 0; h < H; h++) {
            memcpy(c->k_cache + (c->slot[t] * c->key_slot + h * c->key_head) * item,
                   c->k + (t * c->k_token + h * c->k_head) * item, k_bytes);
            memcpy(c->v_cache + (c->slot[t] * c->value_slot + h * c->value_head) * item,
                   c->v + (t * c->v_token + h * c->v_head) * item, v_bytes);
        }
}

/* Kept per thread: memory from the system would be faulted in again at each call. */
static char *thread_memory(size_t bytes)
{
    static _Thread_local char *memory;
    static _Thread_local size_t held;
    if (bytes > held) {
        free(memory);
        memory = malloc(bytes);
        held = memory ? bytes : 0;
    }
    return memory;
}

static int allot(const Call *c, Scratch *w)
{
    const int64_t D = c->width, E = c->value_width, wide = multiple(E, STRIP);
    const int64_t rows =
        larger(multiple(larger(MANY_ROWS, c->groups), TILE), FEW_ROWS * c->kv_heads);
    const int64_t keys = larger(4 * larger(D, E), larger(D, E) + D * BLOCK);
    float *memory = (float *)thread_memory(
        sizeof(float) * (rows * (D + BLOCK + wide + 2) + keys + larger(4 * E, BLOCK * wide)));
    if (!memory) return 0;
    w->queries = memory;
    w->scores = w->queries + rows * D;
    w->sums = w->scores + rows * BLOCK;
    w->top = w->sums + rows * wide;
    w->total = w->top + rows;
    w->keys = w->total + rows;
    w->values = w->keys + keys;
    return 1;
}

/* Sequence b is cut into `tokens` new tokens by `heads` kv heads a unit; returns how many. */
static int64_t cut(const Call *c, int64_t b, int64_t *tokens, int64_t *heads)
{
    const int64_t count = c->cu_q[b + 1] - c->cu_q[b];
    if (count < 1) return 0;
    if (count * c->groups <= FEW_ROWS) {
        const int64_t wanted = c->threads > 1 ? (4 * c->threads - 1) / c->sequences + 1 : 1;
        *tokens = count, *heads = (c->kv_heads - 1) / smaller(wanted, c->kv_heads) + 1;
        return (c->kv_heads - 1) / *heads + 1;
    }
    *tokens = larger(1, MANY_ROWS / c->groups), *heads = 1;
    return (count + *tokens - 1) / *tokens * c->kv_heads;
}

static void run(const Call *c, int64_t b, int64_t part, Scratch *w)
{
    int64_t tokens = 0, heads = 0;
    const int64_t parts = cut(c, b, &tokens, &heads);
    const int64_t per_tile = (c->kv_heads + heads - 1) / heads, tiles = parts / per_tile;
    const int64_t first = (tiles - 1 - part / per_tile) * tokens; /* the longest work first */
    const int64_t head = part % per_tile * heads, count = c->cu_q[b + 1] - c->cu_q[b];
    const Unit unit = {
        c, c->block_table + b * c->table_width, c->cu_q[b] + first, c->kv_len[b] - count + first,
        smaller(tokens, count - first), head, smaller(heads, c->kv_heads - head),
    };
    if (count * c->groups <= FEW_ROWS) attend_few(&unit, w);
    else attend_many(&unit, w);
}

/* Returns 0, or 1 if there was no memory: then `out` is not complete. */
int paged_attention(const Call *c)
{
    int64_t *starts = malloc((c->sequences + 1) * sizeof(int64_t)), known = 0;
    if (!starts) return 1;
    starts[0] = 0;
    for (int64_t b = 0; b < c->sequences; b++) {
        int64_t tokens, heads;
        starts[b + 1] = starts[b] + cut(c, b, &tokens, &heads);
        known += c->kv_len[b];
    }
    const int parallel = c->threads > 1
        && known * c->kv_heads * (c->width + c->value_width) > WORTH_THREADS;
    int failed = 0;
    write_slots(c);
#pragma omp parallel num_threads((int)c->threads) if (parallel)
    {
        Scratch scratch;
        const int ready = allot(c, &scratch);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t unit = 0; unit < starts[c->sequences]; unit++) {
            int64_t low = 0, high = c->sequences; /* starts[low] <= unit < starts[high] */
            while (high - low > 1) {
                const int64_t middle = (low + high) / 2;
                if (starts[middle] <= unit) low = middle;
                else high = middle;
            }
            if (ready) run(c, low, unit - starts[low], &scratch);
            else
#pragma omp atomic write
                failed = 1;
        }
    }
    free(starts);
    return failed;
}
