// What each segment of time makes of the state that enters it: out = decay · in + end. See docs/kernels.md.
// A block owns BLOCK_CHANNELS channels of one segment of one sequence and walks it in tiles, from a state of 0.
// The host also defines REVERSE: whether it walks back through time, where what enters is the gradient of the state that
// the segment leaves. Then x is the gradient of y, B is C, and the gate, if any, belongs to them.

struct Shared {
    alignas(16) scalar x[2][TILE * BLOCK_CHANNELS];
    alignas(16) scalar dt[2][TILE * BLOCK_CHANNELS];
    alignas(16) scalar z[2][GATED ? TILE * BLOCK_CHANNELS : 1];
    alignas(16) float delta[TILE * BLOCK_CHANNELS];   // Δ
    alignas(16) float driven[TILE * BLOCK_CHANNELS];  // Δ·x; REVERSE: gradient of y before the gate
    alignas(16) float B[2][TILE * STATES];
    alignas(16) float bias[BLOCK_CHANNELS];
    alignas(16) float resets[2][TILE];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "variants.py counts the shared memory differently");

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_ends(
    const scalar* x, i64 x_batch, i64 x_time, const scalar* dt, i64 dt_batch, i64 dt_time,
    const scalar* z, i64 z_batch, i64 z_time, const scalar* B, i64 B_batch, i64 B_time,
    const float* A, const float* dt_bias, const int* seq_idx, i64 seq_batch, i64 seq_time, float* ends, float* decays,
    i64 length_, i64 channels_, i64 states_, i64 groups_, i64 segments_, i64 dt_softplus) {
    const int length = length_, channels = channels_, states = states_, groups = groups_, segments = segments_;
    extern __shared__ char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int state0 = lane / CHANNEL_LANES * PER_LANE;                        // the lane's first state
    const int lane_at = lane % CHANNEL_LANES * CHANNELS;                       // its first channel in the warp
    const int mine = warp * WARP_TILE;                                         // where the warp's part of a tile is
    const int channel0 = blockIdx.x % groups * BLOCK_CHANNELS, channel = channel0 + warp * WARP_CHANNELS + lane_at;
    const int left = channels - channel0;  // channels of this block that exist, or more
    // What the last segment in the direction of the walk makes of its state, no segment needs.
    const i64 place = blockIdx.x / groups, batch = place / (segments - 1);
    const int segment = place % (segments - 1) + REVERSE, tiles = (length + TILE - 1) / TILE;
    const int first_tile = segment_tile(tiles, segment, segments), end_tile = segment_tile(tiles, segment + 1, segments);
    const int start_tile = REVERSE ? end_tile - 1 : first_tile;
    constexpr int AHEAD = REVERSE ? -1 : 1;

    for (int c = threadIdx.x; c < BLOCK_CHANNELS; c += THREADS)
        shared.bias[c] = dt_bias != nullptr && c < left ? dt_bias[channel0 + c] : 0.f;
    float a[CHANNELS][PER_LANE], h[CHANNELS][PER_LANE];
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
        for (int s = 0; s < PER_LANE; ++s) {
            bool exists = channel + k < channels && state0 + s < states;
            // Adding 0 waits for the load here and not in the loop, where it would wait for the loop's loads, too.
            a[k][s] = (exists ? A[i64(channel + k) * states + state0 + s] * LOG2E : 0.f) + 0.f;
            h[k][s] = 0.f;
        }

    const i64 row = i64(start_tile) * TILE;
    const Fetch<THREADS> pieces(threadIdx.x, left);
    const scalar* x_next = pieces.place(x + batch * x_batch + channel0 + row * x_time, x_time);
    const scalar* dt_next = pieces.place(dt + batch * dt_batch + channel0 + row * dt_time, dt_time);
    const scalar* z_next = GATED ? pieces.place(z + batch * z_batch + channel0 + row * z_time, z_time) : nullptr;
    const scalar* B_next = StateRows::place(B + batch * B_batch + row * B_time, B_time);
    if constexpr (PACKED) seq_idx += batch * seq_batch;
    StateRows B_rows;
    auto fetch = [&](int tile, int buffer) {  // called for the tiles in the order of the walk
        const int start = tile * TILE, rows = length - start;
        pieces.copy(shared.x[buffer], x_next, x_time, rows);
        pieces.copy(shared.dt[buffer], dt_next, dt_time, rows);
        if constexpr (GATED) pieces.copy(shared.z[buffer], z_next, z_time, rows);
        copies_commit();
        B_rows.read(B_next, B_time, rows, states);
        if constexpr (PACKED) load_resets(shared.resets[buffer], seq_idx, seq_time, start, rows);
        x_next += AHEAD * TILE * x_time;
        dt_next += AHEAD * TILE * dt_time;
        if constexpr (GATED) z_next += AHEAD * TILE * z_time;
        B_next += AHEAD * TILE * B_time;
    };
    constexpr int UNROLL = CHANNELS * PER_LANE <= 8 ? TILE : 4;
    const int vector_channel = warp * WARP_CHANNELS + lane % ROW_VECTORS * VECTOR;  // of the phases without states
    Floats<VECTOR> total{};  // of Δ
    float forget = 0.f;

    fetch(start_tile, 0);
    B_rows.store(shared.B[0]);
    float *delta = shared.delta + mine, *driven = shared.driven + mine;
    for (int i = 0; i < end_tile - first_tile; ++i) {
        const int tile = start_tile + AHEAD * i, buffer = i & 1, rows = length - tile * TILE;
        copies_wait();
        __syncthreads();
        if (i + 1 < end_tile - first_tile) fetch(tile + AHEAD, buffer ^ 1);
#pragma unroll
        for (int j = 0; j < LANE_VECTORS; ++j) {
            const int n = j * 32 + lane;
            if (!EVEN_VECTORS && n >= TILE * ROW_VECTORS) break;
            const int at = n * VECTOR;
            Floats<VECTOR> d = load_vector(shared.dt[buffer] + mine + at), value = load_vector(shared.x[buffer] + mine + at);
            Floats<VECTOR> bias = vector_at(shared.bias + vector_channel);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
                d[k] += bias[k];
                if (dt_softplus) d[k] = softplus(d[k]);
            }
            // Past the end nothing changes: x and B are 0 there.
            if (rows < TILE && n / ROW_VECTORS >= rows) d = Floats<VECTOR>{};
            Floats<VECTOR> gate;
            if constexpr (GATED) gate = load_vector(shared.z[buffer] + mine + at);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
                total[k] += d[k];
                if (!REVERSE) value[k] *= d[k];
                if (GATED) value[k] *= gate[k] * sigmoid(gate[k]);
            }
            vector_at(delta + at) = d;
            vector_at(driven + at) = value;
        }
        __syncwarp();
#pragma unroll UNROLL
        for (int u = 0; u < TILE; ++u) {
            const int t = REVERSE ? TILE - 1 - u : u;
            Floats<CHANNELS> d = *reinterpret_cast<Floats<CHANNELS>*>(delta + t * WARP_CHANNELS + lane_at);
            Floats<CHANNELS> w = *reinterpret_cast<Floats<CHANNELS>*>(driven + t * WARP_CHANNELS + lane_at);
            float reset = PACKED ? shared.resets[buffer][t] : 0.f;
            if (PACKED) forget = fminf(forget, reset);
#pragma unroll
            for (int s0 = 0; s0 < PER_LANE; s0 += 4) {
                Floats<4> b = *reinterpret_cast<Floats<4>*>(shared.B[buffer] + t * STATES + state0 + s0);
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
                    for (int s = 0; s < 4; ++s) {
                        float decay = exp2_fast(PACKED ? fmaf(d[k], a[k][s0 + s], reset) : d[k] * a[k][s0 + s]);
                        float& state = h[k][s0 + s];
                        state = REVERSE ? decay * fmaf(w[k], b[s], state) : fmaf(decay, state, w[k] * b[s]);
                    }
            }
        }
        __syncwarp();
        B_rows.store(shared.B[buffer ^ 1]);
    }

    // Lanes that have treated the same channels add what they have of Δ.
#pragma unroll
    for (int mask = ROW_VECTORS; mask < 32; mask *= 2)
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) total[k] += __shfl_xor_sync(~0u, total[k], mask);
    if (lane < ROW_VECTORS) vector_at(delta + lane * VECTOR) = total;
    __syncwarp();
    const i64 at = (place * channels + channel) * STATES + state0;
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k)
        if (channel + k < channels)
#pragma unroll
            for (int s = 0; s < PER_LANE; s += 4) {
                Floats<4> end, decay;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    end[i] = h[k][s + i];
                    decay[i] = exp2_fast(fmaf(delta[lane_at + k], a[k][s + i], forget));
                }
                *reinterpret_cast<Floats<4>*>(ends + at + k * STATES + s) = end;
                *reinterpret_cast<Floats<4>*>(decays + at + k * STATES + s) = decay;
            }
}
