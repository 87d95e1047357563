// Forward where there are segments enough: as forward.cu, but a lane has a channel to itself, with all its states. Nothing
// is exchanged between lanes, so Δ, y and the gate stay in registers: fewer instructions, and half as many blocks.

static_assert(CHANNELS == 1 && STATE_LANES == 1, "bad shape");
#ifndef UNROLL
#define UNROLL 4
#endif
constexpr int TOGETHER = UNROLL;

struct Shared {
    alignas(16) scalar x[2][TILE * BLOCK_CHANNELS];   // the walk overwrites it with y
    alignas(16) scalar dt[2][TILE * BLOCK_CHANNELS];  // and this with y before the gate
    alignas(16) scalar z[2][GATED ? TILE * BLOCK_CHANNELS : 1];
    alignas(16) float B[2][TILE * STATES];
    alignas(16) float C[2][TILE * STATES];
    alignas(16) float resets[2][TILE];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "variants.py counts the shared memory differently");

__device__ __forceinline__ scalar from_float(float x) {
#if DTYPE == 0
    return x;
#else
    return static_cast<scalar>(pack(x, 0.f));
#endif
}

// Store what a warp has of a tile in shared memory, [TILE][WARP_CHANNELS], to the rows of a contiguous tensor.
__device__ __forceinline__ void store_tile(scalar* to, const scalar* tile, i64 channels, int rows, int left) {
    const int lane = threadIdx.x % 32, first = lane % ROW_VECTORS * VECTOR;
    struct alignas(VECTOR * sizeof(scalar)) Raw { scalar v[VECTOR]; };
#pragma unroll
    for (int j = 0; j < LANE_VECTORS; ++j) {
        const int t = (j * 32 + lane) / ROW_VECTORS;
        const Raw raw = *reinterpret_cast<const Raw*>(tile + t * WARP_CHANNELS + first);
        scalar* at = to + t * channels + first;
        if constexpr (ALIGNED) {
            if (t < rows && first < left) *reinterpret_cast<Raw*>(at) = raw;
        } else {
#pragma unroll
            for (int k = 0; k < VECTOR; ++k)
                if (t < rows && first + k < left) at[k] = raw.v[k];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(
    const scalar* x, i64 x_batch, i64 x_time, const scalar* dt, i64 dt_batch, i64 dt_time,
    const scalar* z, i64 z_batch, i64 z_time, const scalar* B, i64 B_batch, i64 B_time,
    const scalar* C, i64 C_batch, i64 C_time, const float* A, const float* D, const float* dt_bias,
    const int* seq_idx, i64 seq_batch, i64 seq_time, const float* initial_state,
    const float* ends, const float* decays, scalar* y, scalar* ungated, float* final_state, float* starts,
    i64 length_, i64 channels_, i64 states_, i64 groups_, i64 segments_, i64 split_, i64 dt_softplus) {
    const int length = length_, channels = channels_, states = states_, groups = groups_, segments = segments_;
    extern __shared__ char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int channel0 = blockIdx.x % groups * BLOCK_CHANNELS, warp_channel = channel0 + warp * WARP_CHANNELS;
    const int channel = warp_channel + lane;
    const int segment = blockIdx.x / groups % segments;
    const i64 batch = blockIdx.x / groups / segments;
    const int left = channels - channel0;  // channels of this block that exist, or more
    const int tiles = (length + TILE - 1) / TILE;
    const int first_tile = segment_tile(tiles, segment, segments), end_tile = segment_tile(tiles, segment + 1, segments);
    const i64 row = i64(first_tile) * TILE;

    const bool exists = channel < channels;
    const float skip = D != nullptr && exists ? D[channel] : 0.f;
    const float bias = dt_bias != nullptr && exists ? dt_bias[channel] : 0.f;
    float a[PER_LANE], h[CHANNELS][PER_LANE];
#pragma unroll
    for (int s = 0; s < STATES; ++s) {
        a[s] = (exists && s < states ? A[i64(channel) * states + s] * LOG2E : 0.f) + 0.f;
        bool given = exists && s < states && initial_state != nullptr;
        // Adding 0 waits for the load here and not in the loop, where it would wait for the loop's loads, too.
        h[0][s] = (given ? initial_state[(batch * channels + channel) * states + s] : 0.f) + 0.f;
    }

    const Fetch<THREADS> pieces(threadIdx.x, left);
    const scalar* x_next = pieces.place(x + batch * x_batch + row * x_time + channel0, x_time);
    const scalar* dt_next = pieces.place(dt + batch * dt_batch + row * dt_time + channel0, dt_time);
    const scalar* z_next = GATED ? pieces.place(z + batch * z_batch + row * z_time + channel0, z_time) : nullptr;
    const scalar* B_next = StateRows::place(B + batch * B_batch + row * B_time, B_time);
    const scalar* C_next = StateRows::place(C + batch * C_batch + row * C_time, C_time);
    if constexpr (PACKED) seq_idx += batch * seq_batch;
    StateRows B_rows, C_rows;
    auto fetch = [&](int tile) {  // called for the first tile, the one after it, ...
        const int buffer = tile & 1, start = tile * TILE, rows = length - start;
        pieces.copy(shared.x[buffer], x_next, x_time, rows);
        pieces.copy(shared.dt[buffer], dt_next, dt_time, rows);
        if constexpr (GATED) pieces.copy(shared.z[buffer], z_next, z_time, rows);
        copies_commit();
        B_rows.read(B_next, B_time, rows, states);
        C_rows.read(C_next, C_time, rows, states);
        if constexpr (PACKED) load_resets(shared.resets[buffer], seq_idx, seq_time, start, rows);
        x_next += TILE * x_time;
        dt_next += TILE * dt_time;
        if constexpr (GATED) z_next += TILE * z_time;
        B_next += TILE * B_time;
        C_next += TILE * C_time;
    };

    fetch(first_tile);
    const i64 ends_at = (batch * (segments - 1) * split_ * channels + channel) * STATES;
    const int before = segment * static_cast<int>(split_);
    lead_through(h, ends + ends_at, decays + ends_at, before, i64(channels) * STATES, channels - channel);
    B_rows.store(shared.B[first_tile & 1]);
    C_rows.store(shared.C[first_tile & 1]);
    i64 out_at = (batch * length + row) * channels + warp_channel;
    if (starts != nullptr) starts += ((batch * tiles + first_tile) * channels + channel) * STATES;
    for (int tile = first_tile; tile < end_tile; ++tile) {
        const int buffer = tile & 1, rows = length - tile * TILE;
        scalar *x_tile = shared.x[buffer] + warp * WARP_TILE, *dt_tile = shared.dt[buffer] + warp * WARP_TILE;
        copies_wait();
        __syncthreads();
        if (tile + 1 < end_tile) fetch(tile + 1);
        if (starts != nullptr) {
            if (exists)
#pragma unroll
                for (int s = 0; s < STATES; s += 4)
                    *reinterpret_cast<Floats<4>*>(starts + s) = Floats<4>{h[0][s], h[0][s + 1], h[0][s + 2], h[0][s + 3]};
            starts += i64(channels) * STATES;
        }
#pragma unroll TOGETHER
        for (int t = 0; t < TILE; ++t) {
            const int at = t * WARP_CHANNELS + lane;
            float d = to_float(dt_tile[at]) + bias;
            const float value = to_float(x_tile[at]);
            if (dt_softplus) d = softplus(d);
            if (t >= rows) d = 0.f;  // past the end nothing changes: x, B and C are 0 there
            const float w = d * value, reset = PACKED ? shared.resets[buffer][t] : 0.f;
            float out = skip * value;
#pragma unroll
            for (int s0 = 0; s0 < STATES; s0 += 4) {
                Floats<4> b = *reinterpret_cast<Floats<4>*>(shared.B[buffer] + t * STATES + s0);
                Floats<4> c = *reinterpret_cast<Floats<4>*>(shared.C[buffer] + t * STATES + s0);
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    float e = PACKED ? fmaf(d, a[s0 + s], reset) : d * a[s0 + s];
                    float decay = s0 + s < POLY ? exp2_poly(e) : exp2_fast(e);
                    h[0][s0 + s] = fmaf(decay, h[0][s0 + s], w * b[s]);
                    out = fmaf(h[0][s0 + s], c[s], out);
                }
            }
            if constexpr (GATED) {
                if (ungated != nullptr) dt_tile[at] = from_float(out);
                const float gate = to_float(shared.z[buffer][warp * WARP_TILE + at]);
                out *= gate * sigmoid(gate);
            }
            x_tile[at] = from_float(out);
        }
        B_rows.store(shared.B[buffer ^ 1]);
        C_rows.store(shared.C[buffer ^ 1]);
        __syncwarp();
        store_tile(y + out_at, x_tile, channels, rows, channels - warp_channel);
        if (GATED && ungated != nullptr) store_tile(ungated + out_at, dt_tile, channels, rows, channels - warp_channel);
        out_at += i64(TILE) * channels;
    }
    if (segment < segments - 1 || !exists) return;
#pragma unroll
    for (int s = 0; s < STATES; ++s)
        if (s < states) final_state[(batch * channels + channel) * states + s] = h[0][s];
}
