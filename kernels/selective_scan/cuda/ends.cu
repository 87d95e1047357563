// What each segment of time makes of the state that enters it: out = decay · in + end. See docs/kernels.md.
// A block owns BLOCK_CHANNELS channels of one segment of one sequence and walks it in tiles, from a state of 0. A lane
// computes Δ for the states of its channel that it has.
// The host also defines REVERSE: whether it walks back through time, where what enters is the gradient of the state that
// the segment leaves. Then x is the gradient of y, B is C, and the gate, if any, belongs to them.

static_assert(CHANNELS == 1, "bad shape");

struct Shared {
    alignas(16) scalar x[2][TILE * BLOCK_CHANNELS];
    alignas(16) scalar dt[2][TILE * BLOCK_CHANNELS];
    alignas(16) scalar z[2][GATED ? TILE * BLOCK_CHANNELS : 1];
    alignas(16) float B[2][TILE * STATES];
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
    const int mine = warp * WARP_TILE + lane % CHANNEL_LANES;                  // where its channel is in a tile
    const int channel0 = blockIdx.x % groups * BLOCK_CHANNELS;
    const int channel = channel0 + warp * WARP_CHANNELS + lane % CHANNEL_LANES;
    const int left = channels - channel0;  // channels of this block that exist, or more
    // What the last segment in the direction of the walk makes of its state, no segment needs.
    const i64 place = blockIdx.x / groups, batch = place / (segments - 1);
    const int segment = place % (segments - 1) + REVERSE, tiles = (length + TILE - 1) / TILE;
    const int first_tile = segment_tile(tiles, segment, segments), end_tile = segment_tile(tiles, segment + 1, segments);
    const int start_tile = REVERSE ? end_tile - 1 : first_tile;
    constexpr int AHEAD = REVERSE ? -1 : 1;

    const float bias = dt_bias != nullptr && channel < channels ? dt_bias[channel] : 0.f;
    float a[PER_LANE], h[PER_LANE];
#pragma unroll
    for (int s = 0; s < PER_LANE; ++s) {
        bool exists = channel < channels && state0 + s < states;
        // Adding 0 waits for the load here and not in the loop, where it would wait for the loop's loads, too.
        a[s] = (exists ? A[i64(channel) * states + state0 + s] * LOG2E : 0.f) + 0.f;
        h[s] = 0.f;
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
    float total = 0.f, forget = 0.f;  // of Δ; of a document that begins

    fetch(start_tile, 0);
    B_rows.store(shared.B[0]);
    for (int i = 0; i < end_tile - first_tile; ++i) {
        const int tile = start_tile + AHEAD * i, buffer = i & 1, rows = length - tile * TILE;
        const scalar *x_tile = shared.x[buffer] + mine, *dt_tile = shared.dt[buffer] + mine;
        copies_wait();
        __syncthreads();
        if (i + 1 < end_tile - first_tile) fetch(tile + AHEAD, buffer ^ 1);
#pragma unroll 4
        for (int u = 0; u < TILE; ++u) {
            const int t = REVERSE ? TILE - 1 - u : u;
            float d = to_float(dt_tile[t * WARP_CHANNELS]) + bias, w = to_float(x_tile[t * WARP_CHANNELS]);
            if (dt_softplus) d = softplus(d);
            // Past the end x is 0; only the last segment gets there, in which only the sum must know.
            total += !REVERSE || t < rows ? d : 0.f;
            if constexpr (!REVERSE) w *= d;
            if constexpr (GATED) {
                float gate = to_float(shared.z[buffer][mine + t * WARP_CHANNELS]);
                w *= gate * sigmoid(gate);
            }
            const float reset = PACKED ? shared.resets[buffer][t] : 0.f;
            if (PACKED) forget = fminf(forget, reset);
#pragma unroll
            for (int s0 = 0; s0 < PER_LANE; s0 += 4) {
                Floats<4> b = *reinterpret_cast<Floats<4>*>(shared.B[buffer] + t * STATES + state0 + s0);
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    float decay = exp2_fast(PACKED ? fmaf(d, a[s0 + s], reset) : d * a[s0 + s]);
                    float& state = h[s0 + s];
                    state = REVERSE ? decay * fmaf(w, b[s], state) : fmaf(decay, state, w * b[s]);
                }
            }
        }
        B_rows.store(shared.B[buffer ^ 1]);
    }
    if (channel >= channels) return;
    const i64 at = (place * channels + channel) * STATES + state0;
#pragma unroll
    for (int s = 0; s < PER_LANE; s += 4) {
        Floats<4> end, decay;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            end[i] = h[s + i];
            decay[i] = exp2_fast(fmaf(total, a[s + i], forget));
        }
        *reinterpret_cast<Floats<4>*>(ends + at + s) = end;
        *reinterpret_cast<Floats<4>*>(decays + at + s) = decay;
    }
}
