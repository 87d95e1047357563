// What the forward and the backward share. docs/kernels.md explains the algorithm and has a figure.
//
// No header is included, so that NVRTC needs none on the user's machine. The host defines:
//   DTYPE      activations: 0 fp32, 1 fp16, 2 bf16
//   STATES     states of a channel, padded to a power of two
//   PER_LANE   states that one lane holds; STATES / PER_LANE lanes share a channel
//   CHANNELS   channels that one lane holds
//   WARPS      warps of a block
//   TILE       time steps that are in shared memory at once
//   MIN_BLOCKS blocks that must fit on a multiprocessor together (bounds the registers)
//   GATED      whether there is a gate z
//   PACKED     whether there is seq_idx
//   ALIGNED    whether all rows of the activations can be copied in vectors

typedef unsigned int u32;
typedef long long i64;
#if DTYPE == 0
typedef float scalar;
#else
typedef unsigned short scalar;
#endif

constexpr int THREADS = 32 * WARPS;
constexpr int STATE_LANES = STATES / PER_LANE;
constexpr int CHANNEL_LANES = 32 / STATE_LANES;
constexpr int WARP_CHANNELS = CHANNEL_LANES * CHANNELS;
constexpr int BLOCK_CHANNELS = WARPS * WARP_CHANNELS;
constexpr int WARP_TILE = TILE * WARP_CHANNELS;
// In shared memory a tile of activations is [warp][TILE][WARP_CHANNELS], so that each warp finds its own channels.
// In the phases that concern no states a lane treats VECTOR channels of one row at a time.
constexpr int VECTOR = WARP_CHANNELS < 4 ? WARP_CHANNELS : 4;
constexpr int ROW_VECTORS = WARP_CHANNELS / VECTOR;
constexpr int LANE_VECTORS = (TILE * ROW_VECTORS + 31) / 32;
constexpr bool EVEN_VECTORS = TILE * ROW_VECTORS % 32 == 0;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float FORGET = -1e30f;  // added to the exponent, makes the decay 0

constexpr int ROW_BYTES = WARP_CHANNELS * sizeof(scalar);
constexpr int COPY_BYTES = ROW_BYTES % 16 == 0 ? 16 : ROW_BYTES % 8 == 0 ? 8 : 4;
static_assert(STATE_LANES * CHANNEL_LANES == 32 && ROW_BYTES % 4 == 0 && 32 % ROW_VECTORS == 0, "bad shape");

template <int N> struct alignas(N * sizeof(float)) Floats {
    float v[N];
    __device__ __forceinline__ float& operator[](int i) { return v[i]; }
    __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float to_float(scalar x) {
#if DTYPE == 0
    return x;
#elif DTYPE == 1
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    return __uint_as_float(static_cast<u32>(x) << 16);
#endif
}

#if DTYPE != 0
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
#if DTYPE == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
    return y;
}
#endif

__device__ __forceinline__ Floats<VECTOR> load_vector(const scalar* from) {
    constexpr int WORDS = VECTOR * sizeof(scalar) / 4;
    struct alignas(4 * WORDS) Raw { u32 v[WORDS]; };
    Raw raw = *reinterpret_cast<const Raw*>(from);
    Floats<VECTOR> out;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
#if DTYPE == 0
        out[i] = __uint_as_float(raw.v[i]);
#elif DTYPE == 1
        out[i] = to_float(static_cast<scalar>(raw.v[i / 2] >> (16 * (i % 2))));
#else
        out[i] = __uint_as_float(i % 2 ? raw.v[i / 2] & 0xffff0000u : raw.v[i / 2] << 16);
#endif
    }
    return out;
}

__device__ __forceinline__ Floats<VECTOR>& vector_at(float* from) { return *reinterpret_cast<Floats<VECTOR>*>(from); }

// Store VECTOR channels of one row of a contiguous output, of which `valid` exist.
__device__ __forceinline__ void store_vector(scalar* to, const Floats<VECTOR>& values, int valid) {
#if DTYPE == 0
    scalar raw[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) raw[i] = values[i];
#else
    u32 words[VECTOR / 2];
#pragma unroll
    for (int i = 0; i < VECTOR; i += 2) words[i / 2] = pack(values[i], values[i + 1]);
#endif
    if constexpr (ALIGNED) {
        struct alignas(VECTOR * sizeof(scalar)) Raw { u32 v[VECTOR * sizeof(scalar) / 4]; };
        Raw out;
#pragma unroll
        for (int i = 0; i < int(VECTOR * sizeof(scalar) / 4); ++i)
#if DTYPE == 0
            out.v[i] = __float_as_uint(raw[i]);
#else
            out.v[i] = words[i];
#endif
        if (valid > 0) *reinterpret_cast<Raw*>(to) = out;
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
#if DTYPE == 0
            if (i < valid) to[i] = raw[i];
#else
            if (i < valid) to[i] = static_cast<scalar>(words[i / 2] >> (16 * (i % 2)));
#endif
    }
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), the latter by a polynomial: relative error at most 2e-7.
__device__ __forceinline__ float softplus(float x) {
    float e = exp2_fast(-fabsf(x) * LOG2E), p = 0.00523269037f;
    p = fmaf(p, e, -0.0295052286f);
    p = fmaf(p, e, 0.0782259405f);
    p = fmaf(p, e, -0.136632457f);
    p = fmaf(p, e, 0.191060066f);
    p = fmaf(p, e, -0.24842982f);
    p = fmaf(p, e, 0.333190978f);
    p = fmaf(p, e, -0.499994934f);
    p = fmaf(p, e, 0.99999994f);
    return fmaf(p, e, fmaxf(x, 0.f));
}

// The slope of softplus where its value is d: 1 - e^-d, which cancels where d is small.
__device__ __forceinline__ float softplus_slope(float d) {
    float p = -0.000907157431f;
    p = fmaf(p, d, 0.00782370474f);
    p = fmaf(p, d, -0.0414065942f);
    p = fmaf(p, d, 0.166605219f);
    p = fmaf(p, d, -0.499994576f);
    p = fmaf(p, d, 0.99999994f);
    return d < 1.f ? p * d : 1.f - exp2_fast(-d * LOG2E);
}

__device__ __forceinline__ float sigmoid(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.f + exp2_fast(-x * LOG2E)));
    return y;
}

template <int BYTES> __device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    int size = valid ? BYTES : 0;  // what is not copied becomes 0
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(size) : "memory");
    else if constexpr (BYTES == 8)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(from), "r"(size) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(size) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

constexpr int NO_ROW = 1 << 30;  // past the end of any sequence's tile

// Copies tiles of the channels of LANES / 32 warps from global to shared memory, each lane its pieces of the rows.
template <int LANES> struct Fetch {
    static constexpr int WIDTH = LANES / 32 * WARP_CHANNELS, STEP = ALIGNED ? COPY_BYTES / int(sizeof(scalar)) : 1;
    static constexpr int ROW_PIECES = WIDTH / STEP, PIECES = TILE * ROW_PIECES, ROWS = LANES / ROW_PIECES;
    static_assert(LANES % ROW_PIECES == 0, "bad shape");
    int row, to;  // the lane's first piece: its row (NO_ROW where its channels don't exist), and where it goes

    // `index` numbers the lanes; `channels` is how many exist from the first one on.
    __device__ __forceinline__ Fetch(int index, int channels) {
        int c = index % ROW_PIECES * STEP;
        row = index / ROW_PIECES;
        to = c / WARP_CHANNELS * WARP_TILE + row * WARP_CHANNELS + c % WARP_CHANNELS;
        if (c >= channels) row = NO_ROW;
    }
    // Where the lane's first piece is, given the first row and channel of a tensor.
    __device__ __forceinline__ const scalar* place(const scalar* from, i64 stride) const {
        const int index = threadIdx.x % LANES;
        return from + index / ROW_PIECES * stride + index % ROW_PIECES * STEP;
    }
    // Copy the tile whose piece of the lane is at `from`. Rows from `rows` on become 0, as do channels that don't exist.
    __device__ __forceinline__ void copy(scalar* tile, const scalar* from, i64 stride, int rows) const {
#pragma unroll
        for (int k = 0; k < (PIECES + LANES - 1) / LANES; ++k) {
            if (PIECES % LANES != 0 && k * ROWS + static_cast<int>(threadIdx.x % LANES) / ROW_PIECES >= TILE) break;
            bool valid = k * ROWS + row < rows;
            scalar* at = tile + to + k * ROWS * WARP_CHANNELS;
            if constexpr (ALIGNED)
                copy_async<COPY_BYTES>(at, from + k * ROWS * stride, valid);
            else
                *at = valid ? from[k * ROWS * stride] : scalar(0);
        }
    }
};

// TILE rows of B or C on their way to shared memory, where they are fp32 and padded with 0. Read early, stored late, so
// that the reads take their time while the block works.
struct StateRows {
    static constexpr int COUNT = (TILE * STATES + THREADS - 1) / THREADS;
    // A thread has one state of every ROWS-th row, or every THREADS-th state of all rows.
    static constexpr int ROWS = STATES < THREADS ? THREADS / STATES : 1, PER_ROW = STATES > THREADS ? STATES / THREADS : 1;
    scalar v[COUNT];

    __device__ __forceinline__ static const scalar* place(const scalar* from, i64 stride) {
        return from + threadIdx.x / STATES * stride + threadIdx.x % STATES;
    }
    __device__ __forceinline__ void read(const scalar* from, i64 stride, int rows, int states) {
        const int n = threadIdx.x % STATES, t = n < states ? threadIdx.x / STATES : NO_ROW;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            int row = k / PER_ROW * ROWS, state = k % PER_ROW * THREADS;
            bool valid = t + row < rows;
            if (TILE * STATES % THREADS != 0) valid = valid && t + row < TILE;
            if (PER_ROW > 1) valid = valid && n + state < states;
            v[k] = valid ? from[row * stride + state] : scalar(0);
        }
    }
    __device__ __forceinline__ void store(float* to) const {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            int i = k * THREADS + threadIdx.x;
            if (TILE * STATES % THREADS == 0 || i < TILE * STATES) to[i] = to_float(v[k]);
        }
    }
};

// Sum v[0..COUNT) over the lanes that differ in the bits MASK, 2 MASK, ... below LIMIT. Each round halves what a lane
// holds, so the sums end up spread over the lanes: see `spread_index`.
template <int COUNT, int MASK, int LIMIT> __device__ __forceinline__ void sum_lanes(float* v, int lane) {
    if constexpr (MASK < LIMIT) {
        if constexpr (COUNT > 1) {
            bool upper = lane & MASK;
#pragma unroll
            for (int i = 0; i < COUNT / 2; ++i) {
                float keep = upper ? v[i + COUNT / 2] : v[i], send = upper ? v[i] : v[i + COUNT / 2];
                v[i] = keep + __shfl_xor_sync(~0u, send, MASK);
            }
            sum_lanes<COUNT / 2, MASK * 2, LIMIT>(v, lane);
        } else {
            v[0] += __shfl_xor_sync(~0u, v[0], MASK);
            sum_lanes<1, MASK * 2, LIMIT>(v, lane);
        }
    }
}

// After sum_lanes a lane holds the sums [first, first + count); of lanes that hold the same ones, one has `writes`.
struct Spread { int first, count; bool writes; };
template <int COUNT, int MASK, int LIMIT> __device__ __forceinline__ Spread spread_index(int lane) {
    Spread s{0, COUNT, true};
#pragma unroll
    for (int mask = MASK; mask < LIMIT; mask *= 2) {
        if (s.count > 1) {
            s.count /= 2;
            if (lane & mask) s.first += s.count;
        } else if (lane & mask) {
            s.writes = false;
        }
    }
    return s;
}
__device__ constexpr int at_least_one(int x) { return x < 1 ? 1 : x; }

// For document boundaries: what is added to the exponent of each step of the tile that starts at `start`.
template <int LANES = THREADS>
__device__ __forceinline__ void load_resets(float* to, const int* seq_idx, i64 stride, int start, int rows) {
    for (int t = threadIdx.x % LANES; t < TILE; t += LANES) {
        i64 at = start + t;
        bool begins = t < rows && at > 0 && seq_idx[at * stride] != seq_idx[(at - 1) * stride];
        to[t] = begins ? FORGET : 0.f;
    }
}

// The first tile of a segment of time.
__device__ __forceinline__ int segment_tile(int tiles, int segment, int segments) {
    return static_cast<int>(i64(tiles) * segment / segments);
}

// What enters a segment: `state` led through `count` segments, each of which makes decay · state + end of it. They are
// `step` apart in `ends` and `decays`; there is room for STATES states of each channel.
__device__ __forceinline__ void lead_through(
    float (&state)[CHANNELS][PER_LANE], const float* ends, const float* decays, int count, i64 step, int existing) {
#pragma unroll 2
    for (int j = 0; j < count; ++j) {
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
            for (int s = 0; s < PER_LANE; s += 4) {
                const i64 at = j * step + k * STATES + s;
                Floats<4> end{}, decay{};
                if (k < existing) {
                    end = *reinterpret_cast<const Floats<4>*>(ends + at);
                    decay = *reinterpret_cast<const Floats<4>*>(decays + at);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) state[k][s + i] = fmaf(decay[i], state[k][s + i], end[i]);
            }
    }
}
