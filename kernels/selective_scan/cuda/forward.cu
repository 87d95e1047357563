// Forward: see docs/kernels.md. A block owns BLOCK_CHANNELS channels of one segment of one sequence and walks its time in
// tiles. With several segments, `ends` and `decays` are what ends.cu has found out about all but the last.

struct Shared {
    alignas(16) scalar x[2][TILE * BLOCK_CHANNELS];
    alignas(16) scalar dt[2][TILE * BLOCK_CHANNELS];
    alignas(16) scalar z[2][GATED ? TILE * BLOCK_CHANNELS : 1];
    alignas(16) float delta[TILE * BLOCK_CHANNELS];   // Δ; the walk overwrites it with C·h
    alignas(16) float driven[TILE * BLOCK_CHANNELS];  // Δ·x
    alignas(16) float B[2][TILE * STATES];
    alignas(16) float C[2][TILE * STATES];
    alignas(16) float D[BLOCK_CHANNELS];
    alignas(16) float bias[BLOCK_CHANNELS];
    alignas(16) float resets[2][TILE];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "variants.py counts the shared memory differently");

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(
    const scalar* x, i64 x_batch, i64 x_time, const scalar* dt, i64 dt_batch, i64 dt_time,
    const scalar* z, i64 z_batch, i64 z_time, const scalar* B, i64 B_batch, i64 B_time,
    const scalar* C, i64 C_batch, i64 C_time, const float* A, const float* D, const float* dt_bias,
    const int* seq_idx, i64 seq_batch, i64 seq_time, const float* initial_state,
    const float* ends, const float* decays, scalar* y, scalar* ungated, float* final_state, float* starts,
    i64 length_, i64 channels_, i64 states_, i64 groups_, i64 segments_, i64 dt_softplus) {
    const int length = length_, channels = channels_, states = states_, groups = groups_, segments = segments_;
    extern __shared__ char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int state0 = lane / CHANNEL_LANES * PER_LANE;                               // the lane's first state
    const int local = warp * WARP_CHANNELS + lane % CHANNEL_LANES * CHANNELS;         // its first channel in the block
    const int channel0 = blockIdx.x % groups * BLOCK_CHANNELS, channel = channel0 + local;
    const int segment = blockIdx.x / groups % segments;
    const i64 batch = blockIdx.x / groups / segments;
    const int left = channels - channel0;  // channels of this block that exist, or more
    const int tiles = (length + TILE - 1) / TILE;
    const int first_tile = segment_tile(tiles, segment, segments), end_tile = segment_tile(tiles, segment + 1, segments);
    const i64 row = i64(first_tile) * TILE;

    x += batch * x_batch + row * x_time + channel0;
    dt += batch * dt_batch + row * dt_time + channel0;
    if constexpr (GATED) z += batch * z_batch + row * z_time + channel0;
    B += batch * B_batch + row * B_time;
    C += batch * C_batch + row * C_time;
    if constexpr (PACKED) seq_idx += batch * seq_batch;
    const int vector_channel = warp * WARP_CHANNELS + lane % ROW_VECTORS * VECTOR;  // of the phases without states
    i64 out_at = (batch * length + row + lane / ROW_VECTORS) * channels + channel0 + vector_channel;
    if (starts != nullptr) starts += ((batch * tiles + first_tile) * channels + channel) * STATES + state0;

    for (int c = threadIdx.x; c < BLOCK_CHANNELS; c += THREADS) {
        shared.D[c] = D != nullptr && c < left ? D[channel0 + c] : 0.f;
        shared.bias[c] = dt_bias != nullptr && c < left ? dt_bias[channel0 + c] : 0.f;
    }
    float a[CHANNELS][PER_LANE], h[CHANNELS][PER_LANE];
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
        for (int s = 0; s < PER_LANE; ++s) {
            bool exists = channel + k < channels && state0 + s < states;
            a[k][s] = exists ? A[i64(channel + k) * states + state0 + s] * LOG2E : 0.f;
            bool given = exists && initial_state != nullptr;
            // Adding 0 waits for the load here and not in the loop, where it would wait for the loop's loads, too.
            h[k][s] = (given ? initial_state[(batch * channels + channel + k) * states + state0 + s] : 0.f) + 0.f;
        }
    const i64 ends_at = (batch * (segments - 1) * channels + channel) * STATES + state0;
    lead_through(h, ends + ends_at, decays + ends_at, segment, i64(channels) * STATES, channels - channel);

    const Fetch<THREADS> pieces(threadIdx.x, left);
    const scalar *x_next = pieces.place(x, x_time), *dt_next = pieces.place(dt, dt_time);
    const scalar* z_next = GATED ? pieces.place(z, z_time) : nullptr;
    const scalar *B_next = StateRows::place(B, B_time), *C_next = StateRows::place(C, C_time);
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
    constexpr int STEPS = TILE < 4 ? TILE : 4, SUMS = STEPS * CHANNELS;
    constexpr int UNROLL = CHANNELS == 2 ? TILE / STEPS : 1;  // measured: faster for two channels, slower for one
    constexpr int LANE_SUMS = at_least_one(SUMS / STATE_LANES), TOGETHER = LANE_SUMS % CHANNELS == 0 ? CHANNELS : 1;
    const Spread spread = spread_index<SUMS, CHANNEL_LANES, 32>(lane);

    fetch(first_tile);
    B_rows.store(shared.B[first_tile & 1]);
    C_rows.store(shared.C[first_tile & 1]);
    const int lane_at = lane % CHANNEL_LANES * CHANNELS;
    float *delta = shared.delta + warp * WARP_TILE, *driven = shared.driven + warp * WARP_TILE;
    for (int tile = first_tile; tile < end_tile; ++tile) {
        const int buffer = tile & 1, start = tile * TILE, rows = length - start;
        const scalar *x_tile = shared.x[buffer] + warp * WARP_TILE, *dt_tile = shared.dt[buffer] + warp * WARP_TILE;
        copies_wait();
        __syncthreads();
        if (tile + 1 < end_tile) fetch(tile + 1);
#pragma unroll
        for (int j = 0; j < LANE_VECTORS; ++j) {
            const int i = j * 32 + lane;
            if (!EVEN_VECTORS && i >= TILE * ROW_VECTORS) break;
            const int at = i * VECTOR, t = i / ROW_VECTORS;
            Floats<VECTOR> raw = load_vector(dt_tile + at), value = load_vector(x_tile + at);
            Floats<VECTOR> bias = vector_at(shared.bias + vector_channel);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
                float d = raw[k] + bias[k];
                if (dt_softplus) d = softplus(d);
                raw[k] = d;
                value[k] *= d;
            }
            vector_at(delta + at) = raw;
            vector_at(driven + at) = value;
            // Past the end nothing changes: x, B and C are 0 there.
            if (rows < TILE && t >= rows) vector_at(delta + at) = Floats<VECTOR>{};
        }
        __syncwarp();

        if (starts != nullptr) {
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k)
                if (channel + k < channels) {
                    float* to = starts + k * STATES;
#pragma unroll
                    for (int s = 0; s < PER_LANE; s += 4) {
                        Floats<4> out{h[k][s], h[k][s + 1], h[k][s + 2], h[k][s + 3]};
                        *reinterpret_cast<Floats<4>*>(to + s) = out;
                    }
                }
            starts += i64(channels) * STATES;
        }
#pragma unroll UNROLL
        for (int t = 0; t < TILE; t += STEPS) {
            float sums[SUMS];
#pragma unroll
            for (int u = 0; u < STEPS; ++u) {
                Floats<CHANNELS> d = *reinterpret_cast<Floats<CHANNELS>*>(delta + (t + u) * WARP_CHANNELS + lane_at);
                Floats<CHANNELS> w = *reinterpret_cast<Floats<CHANNELS>*>(driven + (t + u) * WARP_CHANNELS + lane_at);
                float reset = PACKED ? shared.resets[buffer][t + u] : 0.f;
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) sums[u * CHANNELS + k] = 0.f;
#pragma unroll
                for (int s0 = 0; s0 < PER_LANE; s0 += 4) {
                    Floats<4> b = *reinterpret_cast<Floats<4>*>(shared.B[buffer] + (t + u) * STATES + state0 + s0);
                    Floats<4> c = *reinterpret_cast<Floats<4>*>(shared.C[buffer] + (t + u) * STATES + state0 + s0);
#pragma unroll
                    for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
                        for (int s = 0; s < 4; ++s) {
                            float decay = exp2_fast(PACKED ? fmaf(d[k], a[k][s0 + s], reset) : d[k] * a[k][s0 + s]);
                            h[k][s0 + s] = fmaf(decay, h[k][s0 + s], w[k] * b[s]);
                            sums[u * CHANNELS + k] = fmaf(h[k][s0 + s], c[s], sums[u * CHANNELS + k]);
                        }
                }
            }
            sum_lanes<SUMS, CHANNEL_LANES, 32>(sums, lane);
            __syncwarp();
            if (spread.writes)
#pragma unroll
                for (int i = 0; i < LANE_SUMS; i += TOGETHER) {
                    int index = spread.first + i;
                    float* to = delta + (t + index / CHANNELS) * WARP_CHANNELS + lane_at + index % CHANNELS;
                    Floats<TOGETHER> out;
#pragma unroll
                    for (int j = 0; j < TOGETHER; ++j) out[j] = sums[i + j];
                    *reinterpret_cast<Floats<TOGETHER>*>(to) = out;
                }
        }
        __syncwarp();
        B_rows.store(shared.B[buffer ^ 1]);
        C_rows.store(shared.C[buffer ^ 1]);

#pragma unroll
        for (int j = 0; j < LANE_VECTORS; ++j) {
            const int i = j * 32 + lane;
            if (!EVEN_VECTORS && i >= TILE * ROW_VECTORS) break;
            const int at = i * VECTOR, t = i / ROW_VECTORS;
            Floats<VECTOR> out = vector_at(delta + at), value = load_vector(x_tile + at);
            Floats<VECTOR> skip = vector_at(shared.D + vector_channel);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) out[k] = fmaf(skip[k], value[k], out[k]);
            int valid = t < rows ? left - vector_channel : 0;
            i64 to = out_at + j * (32 / ROW_VECTORS) * i64(channels);
            if constexpr (GATED) {
                if (ungated != nullptr) store_vector(ungated + to, out, valid);
                Floats<VECTOR> gate = load_vector(shared.z[buffer] + warp * WARP_TILE + at);
#pragma unroll
                for (int k = 0; k < VECTOR; ++k) out[k] *= gate[k] * sigmoid(gate[k]);
            }
            store_vector(y + to, out, valid);
        }
        __syncwarp();
        out_at += i64(TILE) * channels;
    }
    if (segment < segments - 1) return;
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
        for (int s = 0; s < PER_LANE; ++s)
            if (channel + k < channels && state0 + s < states)
                final_state[(batch * channels + channel + k) * states + state0 + s] = h[k][s];
}
