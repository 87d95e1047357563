// Backward: see docs/kernels.md. A block owns BLOCK_CHANNELS channels of one sequence and walks its time in tiles, from
// the last to the first. It computes the states of a tile again from the one that the forward saved.
// The host also defines CHUNK: steps whose states and decays are in registers at once.

constexpr int CHUNKS = TILE / CHUNK;
static_assert(CHUNKS > 1, "the state before a tile waits in shared memory");
constexpr int LANE_STATES = CHANNELS * PER_LANE;
constexpr int VALUES = 2 * PER_LANE;  // parts of dB and dC that a lane has in one step

struct Shared {
    alignas(16) scalar x[2][TILE * BLOCK_CHANNELS];
    alignas(16) scalar dt[TILE * BLOCK_CHANNELS];
    alignas(16) scalar dy[TILE * BLOCK_CHANNELS];
    alignas(16) scalar z[GATED ? TILE * BLOCK_CHANNELS : 1];
    alignas(16) scalar ungated[GATED ? TILE * BLOCK_CHANNELS : 1];
    alignas(16) float delta[TILE * BLOCK_CHANNELS];   // Δ
    alignas(16) float driven[TILE * BLOCK_CHANNELS];  // Δ·x; the walk overwrites it with its gradient
    alignas(16) float dy_core[TILE * BLOCK_CHANNELS]; // gradient of y before the gate
    // Gradient of Δ through the decay, over ln 2; a row further on than `driven`, in other banks than its.
    alignas(16) float decay_grad[WARP_CHANNELS + TILE * BLOCK_CHANNELS];
    alignas(16) float B[TILE * STATES];
    alignas(16) float C[TILE * STATES];
    alignas(16) float h[CHUNKS - 1][LANE_STATES / 4][THREADS][4];  // states at the start of each chunk
    alignas(16) float BC_grad[WARPS][TILE][2 * STATES];
    alignas(16) float sums[2][THREADS][VECTOR];  // of the gradients of D and dt_bias
    alignas(16) float D[WARPS][WARP_CHANNELS];
    alignas(16) float bias[WARPS][WARP_CHANNELS];
    alignas(16) float resets[TILE];
    alignas(16) int item;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "variants.py counts the shared memory differently");

// Sums over the channels of a warp of the parts v[dB 0..PER_LANE, dC 0..PER_LANE) of dB and dC of each step, steps
// coming in descending order; they go to row[2 * STATES] of their step.
#if DTYPE == 2
constexpr bool TENSOR_SUMS = PER_LANE == 4 && (CHANNEL_LANES == 4 || CHANNEL_LANES == 8) && CHUNK % 2 == 0;
#else
constexpr bool TENSOR_SUMS = false;  // tf32 is not exact enough
#endif
// The tensor cores cut their inputs to 10 bits of mantissa, which makes them smaller by 2^-11 / (2 ln 2) on average.
constexpr float UNCUT = TENSOR_SUMS ? 1.000352f : 1.f;

template <bool TENSOR> struct ChannelSums {
    Spread spread;

    __device__ __forceinline__ void prepare(int lane) { spread = spread_index<VALUES, 1, CHANNEL_LANES>(lane); }
    __device__ __forceinline__ void add(int step, float (&v)[VALUES], float* row, int lane, int state0) {
        sum_lanes<VALUES, 1, CHANNEL_LANES>(v, lane);
        if (spread.writes)
#pragma unroll
            for (int i = 0; i < at_least_one(VALUES / CHANNEL_LANES); ++i) {
                int index = spread.first + i;
                row[index / PER_LANE * STATES + state0 + index % PER_LANE] = v[i];
            }
    }
};

// A product with a matrix of zeros and ones sums over lane % 4 without shuffles. In the fragments of m16n8k8 the values
// are A: v0 and v1 in rows lane / 4 and lane / 4 + 8, columns 0-3; v2 and v3 the same in columns 4-7. The ones of B lead
// the sums of columns 0-3 and 4-7 into columns 2m and 2m + 1 of the result, which lanes with lane % 4 == m hold. Four
// products (m: dB and dC of a step, dB and dC of the step before it) fill one result.
template <> struct ChannelSums<true> {
    float ones[8], sum[4];

    __device__ __forceinline__ void prepare(int lane) {
#pragma unroll
        for (int i = 0; i < 8; ++i) ones[i] = lane / 4 == i ? 1.f : 0.f;
    }
    __device__ __forceinline__ void multiply(const float* v, int m) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(__float_as_uint(v[0])), "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])),
              "r"(__float_as_uint(v[3])), "r"(__float_as_uint(ones[2 * m])), "r"(__float_as_uint(ones[2 * m + 1])));
    }
    __device__ __forceinline__ void add(int step, float (&v)[VALUES], float* row, int lane, int state0) {
        if (step % 2 == 1) {
            sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
            multiply(v, 0);
            multiply(v + PER_LANE, 1);
        } else {
            multiply(v, 2);
            multiply(v + PER_LANE, 3);
            row += lane % 4 < 2 ? 2 * STATES : 0;  // this step's row, or the one after it
            row += lane % 2 * STATES;
            if constexpr (CHANNEL_LANES == 4) {
                *reinterpret_cast<Floats<4>*>(row + lane / 4 * 4) = Floats<4>{sum[0], sum[2], sum[1], sum[3]};
            } else {
                bool upper = lane & 4;  // the other half of the channels is there: exchange two states for two
                float keep0 = upper ? sum[1] : sum[0], keep1 = upper ? sum[3] : sum[2];
                float send0 = upper ? sum[0] : sum[1], send1 = upper ? sum[2] : sum[3];
                keep0 += __shfl_xor_sync(~0u, send0, 4);
                keep1 += __shfl_xor_sync(~0u, send1, 4);
                *reinterpret_cast<Floats<2>*>(row + lane / 8 * 4 + (upper ? 2 : 0)) = Floats<2>{keep0, keep1};
            }
        }
    }
};

// Blocks take their work from a queue, so that each multiprocessor gets its share of it however long the parts take. A
// unit has `per_unit` items, which must be done in order; its next one is queued when one is done. The queue is
// [items taken, items added, the added ones], all 0 at first; the first items of the units are not written down.
__device__ __forceinline__ int take_item(int* queue, int units, int per_unit, int& shared_item) {
    __syncthreads();  // nobody needs shared memory any more
    if (threadIdx.x == 0) {
        const int ticket = atomicAdd(queue, 1);
        int item = ticket < units ? ticket * per_unit : -1;
        if (ticket >= units && ticket < units * per_unit) {
            const int* entry = queue + 2 + ticket - units;
            while (true) {
                asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(item) : "l"(entry) : "memory");
                if (item != 0) break;
                __nanosleep(200);
            }
        }
        shared_item = item;
    }
    __syncthreads();
    return shared_item;
}

// After this, whoever takes `item` sees what this block has written.
__device__ __forceinline__ void add_item(int* queue, int item) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        int* entry = queue + 2 + atomicAdd(queue + 1, 1);
        asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(entry), "r"(item) : "memory");
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(
    const scalar* x, i64 x_batch, i64 x_time, const scalar* dt, i64 dt_batch, i64 dt_time,
    const scalar* z, i64 z_batch, i64 z_time, const scalar* B, i64 B_batch, i64 B_time,
    const scalar* C, i64 C_batch, i64 C_time, const float* A, const float* D, const float* dt_bias,
    const int* seq_idx, i64 seq_batch, i64 seq_time,
    const scalar* dy, i64 dy_batch, i64 dy_time, const float* final_grad, const float* starts, const scalar* ungated,
    scalar* dx, scalar* ddt, scalar* dz, i64 dz_batch, i64 dz_time, float* BC_parts, float* A_parts, float* D_parts, float* bias_parts,
    float* initial_grad, const float* ends, const float* decays, int* queue, i64 length_, i64 channels_, i64 states_,
    i64 workers_, i64 units_, i64 group_items_, i64 segments_, i64 dt_softplus) {
    const int length = length_, channels = channels_, states = states_, workers = workers_, units = units_;
    const int segments = segments_;
    const bool apart = ends != nullptr;                // segments are done side by side, and are units of their own
    const int in_turn = apart ? 1 : segments, per_unit = group_items_ * in_turn;
    extern __shared__ char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int state0 = lane / CHANNEL_LANES * PER_LANE;                        // the lane's first state
    const int lane_at = lane % CHANNEL_LANES * CHANNELS;                       // its first channel in the warp
    const int mine = warp * WARP_TILE;                                         // where the warp's part of a tile is
    const int tiles = (length + TILE - 1) / TILE;
    ChannelSums<TENSOR_SUMS> channel_sums;
    channel_sums.prepare(lane);
    const Spread over_states = spread_index<2 * CHANNELS, CHANNEL_LANES, 32>(lane);

    // A unit of work is a part of dB and dC: usually a group of channels of a sequence; with many states several groups,
    // one after another, to bound the size of BC_parts. An item is a segment of the time of a group.
    for (int item; (item = take_item(queue, units, per_unit, shared.item)) >= 0;) {
        const int unit = item / per_unit, worker = unit % workers;
        const i64 part = unit / workers, batch = apart ? part / segments : part;  // of the sums over time; the sequence
        const int group = worker + item % per_unit / in_turn * workers;
        const int segment = apart ? part % segments : segments - 1 - item % segments;
        const int first_tile = segment_tile(tiles, segment, segments);
        const int end_tile = segment_tile(tiles, segment + 1, segments);
        const bool first = apart || segment == segments - 1;  // of its part: the last in time
        const scalar *B_from = B + batch * B_batch, *C_from = C + batch * C_batch;
        const int* documents = PACKED ? seq_idx + batch * seq_batch : nullptr;
        float* parts = BC_parts + (batch * workers + worker) * length * (2 * STATES);
        const int channel0 = group * BLOCK_CHANNELS + warp * WARP_CHANNELS;  // the warp's first channel
        const int channel = channel0 + lane_at;                              // the lane's
        const int left = channels - channel0;                                // channels of this warp that exist, or more
        const int block0 = group * BLOCK_CHANNELS;  // the block's first channel
        const scalar* x_rows = x + batch * x_batch + block0;
        const scalar* dt_rows = dt + batch * dt_batch + block0;
        const scalar* dy_rows = dy + batch * dy_batch + block0;
        const scalar* z_rows = GATED ? z + batch * z_batch + block0 : nullptr;
        const i64 row0 = batch * length;
        const scalar* ungated_rows = GATED ? ungated + row0 * channels + block0 : nullptr;

        for (int c = lane; c < WARP_CHANNELS; c += 32) {
            shared.D[warp][c] = D != nullptr && c < left ? D[channel0 + c] : 0.f;
            shared.bias[warp][c] = dt_bias != nullptr && c < left ? dt_bias[channel0 + c] : 0.f;
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) shared.sums[0][threadIdx.x][i] = shared.sums[1][threadIdx.x][i] = 0.f;

        float a[CHANNELS][PER_LANE], A_grad[CHANNELS][PER_LANE];
        float carry[CHANNELS][PER_LANE];  // gradient of the state after the step at hand, from the steps after it
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
            for (int s = 0; s < PER_LANE; ++s) {
                bool exists = channel + k < channels && state0 + s < states;
                a[k][s] = exists ? A[i64(channel + k) * states + state0 + s] * LOG2E : 0.f;
                // A segment leaves carry and A_grad where the gradients go, and the next one goes on from there.
                const float* before = first ? final_grad : initial_grad;
                i64 at = (batch * channels + channel + k) * states + state0 + s;
                // Adding 0 waits for the loads here and not in the loop, where it would wait for the loop's loads, too.
                carry[k][s] = (exists && before != nullptr ? before[at] : 0.f) + 0.f;
                A_grad[k][s] = (exists && !first ? A_parts[at] : 0.f) + 0.f;
            }
        if (apart) {  // from the last in time to the one after this
            const i64 step = i64(channels) * STATES;
            const i64 at = ((batch + 1) * (segments - 1) - 1) * step + i64(channel) * STATES + state0;
            lead_through(carry, ends + at, decays + at, segments - 1 - segment, -step, channels - channel);
        }

        const Fetch<THREADS> pieces(threadIdx.x, left + warp * WARP_CHANNELS);
        const i64 last = i64(end_tile - 1) * TILE;
        const scalar *x_next = pieces.place(x_rows + last * x_time, x_time);
        const scalar *dt_next = pieces.place(dt_rows + last * dt_time, dt_time);
        const scalar *dy_next = pieces.place(dy_rows + last * dy_time, dy_time);
        const scalar *z_next = GATED ? pieces.place(z_rows + last * z_time, z_time) : nullptr;
        const scalar *ungated_next = GATED ? pieces.place(ungated_rows + last * channels, channels) : nullptr;
        const scalar *B_next = StateRows::place(B_from + last * B_time, B_time);
        const scalar *C_next = StateRows::place(C_from + last * C_time, C_time);
        StateRows B_rows, C_rows;
        auto fetch = [&](int tile) {  // called for the last tile, the one before it, ...
            const int rows = length - tile * TILE;
            pieces.copy(shared.x[tile & 1], x_next, x_time, rows);
            pieces.copy(shared.dt, dt_next, dt_time, rows);
            pieces.copy(shared.dy, dy_next, dy_time, rows);
            if constexpr (GATED) {
                pieces.copy(shared.z, z_next, z_time, rows);
                pieces.copy(shared.ungated, ungated_next, channels, rows);
                z_next -= TILE * z_time;
                ungated_next -= TILE * i64(channels);
            }
            copies_commit();
            B_rows.read(B_next, B_time, rows, states);
            C_rows.read(C_next, C_time, rows, states);
            x_next -= TILE * x_time;
            dt_next -= TILE * dt_time;
            dy_next -= TILE * dy_time;
            B_next -= TILE * B_time;
            C_next -= TILE * C_time;
        };
        const int vector_channel = lane % ROW_VECTORS * VECTOR;  // in the warp, of the phases without states
        i64 out_at = (row0 + last + lane / ROW_VECTORS) * channels + channel0 + vector_channel;
        i64 dz_at = batch * dz_batch + (last + lane / ROW_VECTORS) * dz_time + channel0 + vector_channel;
        const float* start_at = starts + ((batch * tiles + end_tile - 1) * channels + channel) * STATES + state0;

        auto fetch_start = [&] {  // the state before a tile; a lane copies what it will read itself
#pragma unroll
            for (int i = 0; i < LANE_STATES; i += 4) {
                const int k = i / PER_LANE;
                copy_async<16>(shared.h[0][i / 4][threadIdx.x], start_at + k * STATES + i % PER_LANE, channel + k < channels);
            }
            copies_commit();
            start_at -= i64(channels) * STATES;
        };

        fetch(end_tile - 1);
        fetch_start();
        copies_wait();
        __syncthreads();
        float *delta = shared.delta + mine, *driven = shared.driven + mine, *dy_core = shared.dy_core + mine;
        float* decay_grad = shared.decay_grad + WARP_CHANNELS + mine;
        for (int tile = end_tile - 1; tile >= first_tile; --tile) {
            const int buffer = tile & 1, start = tile * TILE, rows = length - start;
            float h[CHUNK + 1][CHANNELS][PER_LANE];
            auto load_chunk_start = [&](int chunk) {
#pragma unroll
                for (int i = 0; i < LANE_STATES; i += 4) {
                    Floats<4> from = *reinterpret_cast<Floats<4>*>(shared.h[chunk][i / 4][threadIdx.x]);
#pragma unroll
                    for (int j = 0; j < 4; ++j) h[0][(i + j) / PER_LANE][(i + j) % PER_LANE] = from[j];
                }
            };
            B_rows.store(shared.B);
            C_rows.store(shared.C);
            if constexpr (PACKED) load_resets(shared.resets, documents, seq_time, start, rows);

            // Everything that concerns a channel and not a state.
#pragma unroll
            for (int j = 0; j < LANE_VECTORS; ++j) {
                const int i = j * 32 + lane;
                if (!EVEN_VECTORS && i >= TILE * ROW_VECTORS) break;
                const int t = i / ROW_VECTORS, at = i * VECTOR;
                const int valid = t < rows ? left - vector_channel : 0;
                Floats<VECTOR> d = load_vector(shared.dt + mine + at), value = load_vector(shared.x[buffer] + mine + at);
                Floats<VECTOR> grad = load_vector(shared.dy + mine + at), bias = vector_at(shared.bias[warp] + vector_channel);
#pragma unroll
                for (int k = 0; k < VECTOR; ++k) {
                    d[k] += bias[k];
                    if (dt_softplus) d[k] = softplus(d[k]);
                    value[k] *= d[k];
                }
                vector_at(delta + at) = d;
                // Past the end nothing changes: x, B, C and dy are 0 there.
                if (rows < TILE && t >= rows) vector_at(delta + at) = Floats<VECTOR>{};
                vector_at(driven + at) = value;
                if constexpr (GATED) {
                    Floats<VECTOR> gate = load_vector(shared.z + mine + at), core = load_vector(shared.ungated + mine + at);
#pragma unroll
                    for (int k = 0; k < VECTOR; ++k) {
                        float s = sigmoid(gate[k]);
                        core[k] *= grad[k] * s * (1.f + gate[k] * (1.f - s));
                        grad[k] *= gate[k] * s;
                    }
                    store_vector(dz + (dz_at + j * (32 / ROW_VECTORS) * dz_time), core, valid);
                }
                vector_at(dy_core + at) = grad;
            }
            __syncthreads();  // B and C are there; the last tile's BC_grad and this tile's activations have been read
            if (tile > first_tile) fetch(tile - 1);

            auto step_forward = [&](int t, const float (&from)[CHANNELS][PER_LANE], float (&to)[CHANNELS][PER_LANE],
                                    float (&decay)[CHANNELS][PER_LANE]) {
                Floats<CHANNELS> d = *reinterpret_cast<Floats<CHANNELS>*>(delta + t * WARP_CHANNELS + lane_at);
                Floats<CHANNELS> w = *reinterpret_cast<Floats<CHANNELS>*>(driven + t * WARP_CHANNELS + lane_at);
                float reset = PACKED ? shared.resets[t] : 0.f;
#pragma unroll
                for (int s0 = 0; s0 < PER_LANE; s0 += 4) {
                    Floats<4> b = *reinterpret_cast<Floats<4>*>(shared.B + t * STATES + state0 + s0);
#pragma unroll
                    for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
                        for (int s = 0; s < 4; ++s) {
                            float e = PACKED ? fmaf(d[k], a[k][s0 + s], reset) : d[k] * a[k][s0 + s];
                            decay[k][s0 + s] = exp2_fast(e);
                            to[k][s0 + s] = fmaf(decay[k][s0 + s], from[k][s0 + s], w[k] * b[s]);
                        }
                }
            };

            // Forward through the tile, leaving the state at the start of each chunk.
            load_chunk_start(0);
#pragma unroll 1
            for (int chunk = 0; chunk < CHUNKS - 1; ++chunk) {
                float decay[CHANNELS][PER_LANE];
#pragma unroll
                    for (int i = 0; i < LANE_STATES; i += 4) {
                        Floats<4> out;
#pragma unroll
                        for (int j = 0; j < 4; ++j) out[j] = h[0][(i + j) / PER_LANE][(i + j) % PER_LANE];
                        *reinterpret_cast<Floats<4>*>(shared.h[chunk][i / 4][threadIdx.x]) = out;
                    }
#pragma unroll
                for (int u = 0; u < CHUNK; ++u) step_forward(chunk * CHUNK + u, h[0], h[0], decay);
            }

            // Back through its chunks.
#pragma unroll 1
            for (int chunk = CHUNKS - 1; chunk >= 0; --chunk) {
                if (chunk < CHUNKS - 1) load_chunk_start(chunk);
                if (chunk == 0 && tile > first_tile) {
                    __syncwarp();
                    fetch_start();  // of the tile before: this one's has just been read
                }
                float decay[CHUNK][CHANNELS][PER_LANE];
#pragma unroll
                for (int u = 0; u < CHUNK; ++u) step_forward(chunk * CHUNK + u, h[u], h[u + 1], decay[u]);
#pragma unroll
                for (int u = CHUNK - 1; u >= 0; --u) {
                    const int t = chunk * CHUNK + u, at = t * WARP_CHANNELS + lane_at;
                    Floats<CHANNELS> d = *reinterpret_cast<Floats<CHANNELS>*>(delta + at);
                    Floats<CHANNELS> w = *reinterpret_cast<Floats<CHANNELS>*>(driven + at);
                    Floats<CHANNELS> grad = *reinterpret_cast<Floats<CHANNELS>*>(dy_core + at);
                    float BC[VALUES], sums[2 * CHANNELS];
#pragma unroll
                    for (int i = 0; i < VALUES; ++i) BC[i] = 0.f;
#pragma unroll
                    for (int i = 0; i < 2 * CHANNELS; ++i) sums[i] = 0.f;
#pragma unroll
                    for (int s0 = 0; s0 < PER_LANE; s0 += 4) {
                        Floats<4> b = *reinterpret_cast<Floats<4>*>(shared.B + t * STATES + state0 + s0);
                        Floats<4> c = *reinterpret_cast<Floats<4>*>(shared.C + t * STATES + state0 + s0);
#pragma unroll
                        for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                const int s = s0 + i;
                                float g = fmaf(c[i], grad[k], carry[k][s]);  // gradient of the state
                                BC[s] = fmaf(w[k], g, BC[s]);
                                BC[PER_LANE + s] = fmaf(grad[k], h[u + 1][k][s], BC[PER_LANE + s]);
                                sums[k] = fmaf(g, b[i], sums[k]);
                                carry[k][s] = decay[u][k][s] * g;
                                float p = carry[k][s] * h[u][k][s];  // gradient of the exponent Δ·A
                                sums[CHANNELS + k] = fmaf(a[k][s], p, sums[CHANNELS + k]);
                                A_grad[k][s] = fmaf(d[k], p, A_grad[k][s]);
                            }
                    }
                    channel_sums.add(u, BC, shared.BC_grad[warp][t], lane, state0);
                    sum_lanes<2 * CHANNELS, CHANNEL_LANES, 32>(sums, lane);
                    __syncwarp();
                    if (over_states.writes)
#pragma unroll
                        for (int i = 0; i < at_least_one(2 * CHANNELS / STATE_LANES); ++i) {
                            int index = over_states.first + i;
                            float* to = index < CHANNELS ? driven : decay_grad;
                            to[at + index % CHANNELS] = sums[i];
                        }
                }
            }
            copies_wait();
            __syncthreads();  // BC_grad and the next tile's activations are there

            Floats<VECTOR> D_sum{}, bias_sum{};
#pragma unroll
            for (int j = 0; j < LANE_VECTORS; ++j) {
                const int i = j * 32 + lane;
                if (!EVEN_VECTORS && i >= TILE * ROW_VECTORS) break;
                const int t = i / ROW_VECTORS, at = i * VECTOR;
                const int valid = t < rows ? left - vector_channel : 0;
                const i64 to = out_at + j * (32 / ROW_VECTORS) * i64(channels);
                Floats<VECTOR> d = vector_at(delta + at);
                Floats<VECTOR> driven_grad = vector_at(driven + at);
                Floats<VECTOR> grad = vector_at(dy_core + at);
                Floats<VECTOR> delta_grad = vector_at(decay_grad + at);
                Floats<VECTOR> value = load_vector(shared.x[buffer] + mine + at);
                Floats<VECTOR> skip = vector_at(shared.D[warp] + vector_channel), out;
#pragma unroll
                for (int k = 0; k < VECTOR; ++k) {
                    delta_grad[k] = fmaf(driven_grad[k], value[k], LN2 * delta_grad[k]);
                    delta_grad[k] *= dt_softplus ? softplus_slope(d[k]) : t < rows ? 1.f : 0.f;
                    out[k] = fmaf(driven_grad[k], d[k], grad[k] * skip[k]);
                    D_sum[k] = fmaf(grad[k], value[k], D_sum[k]);
                    bias_sum[k] += delta_grad[k];
                }
                store_vector(dx + to, out, valid);
                store_vector(ddt + to, delta_grad, valid);
            }
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {  // the sums of a tile first: fewer roundings
                shared.sums[0][threadIdx.x][k] += D_sum[k];
                shared.sums[1][threadIdx.x][k] += bias_sum[k];
            }
#pragma unroll
            for (int j = 0; j < (TILE * STATES / 2 + THREADS - 1) / THREADS; ++j) {
                const int i = 4 * (j * THREADS + threadIdx.x);
                if (i >= 2 * STATES * (rows < TILE ? rows : TILE)) break;
                Floats<4> sum{};
#pragma unroll
                for (int w = 0; w < WARPS; ++w) {
                    Floats<4> part = *reinterpret_cast<Floats<4>*>(&shared.BC_grad[w][0][0] + i);
#pragma unroll
                    for (int k = 0; k < 4; ++k) sum[k] += part[k];
                }
                Floats<4>& to = *reinterpret_cast<Floats<4>*>(parts + i64(start) * (2 * STATES) + i);
                if (group != worker)
#pragma unroll
                    for (int k = 0; k < 4; ++k) sum[k] += to[k];
                to = sum;
            }
            out_at -= i64(TILE) * channels;
            dz_at -= TILE * dz_time;
        }

#pragma unroll
        for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
            for (int s = 0; s < PER_LANE; ++s)
                if (channel + k < channels && state0 + s < states) {
                    const i64 at = i64(channel + k) * states + state0 + s, size = i64(channels) * states;
                    if (!apart || segment == 0) initial_grad[batch * size + at] = carry[k][s];
                    A_parts[part * size + at] = A_grad[k][s];
                }
        __syncwarp();
        for (int c = lane; c < WARP_CHANNELS && c < left; c += 32) {
            float D_sum = 0.f, bias_sum = 0.f;
            for (int i = warp * 32 + c / VECTOR; i < warp * 32 + 32; i += ROW_VECTORS) {
                D_sum += shared.sums[0][i][c % VECTOR];
                bias_sum += shared.sums[1][i][c % VECTOR];
            }
            const i64 at = part * channels + channel0 + c;
            D_parts[at] = first ? D_sum : D_parts[at] + D_sum;
            bias_parts[at] = first ? bias_sum : bias_parts[at] + bias_sum;
        }
        if ((item + 1) % per_unit != 0) add_item(queue, item + 1);
    }
}

// Add the parts of dB and dC of all units, and those of dA, dD and the bias's gradient of all sequences (and segments), in
// a fixed order.
extern "C" __global__ void __launch_bounds__(256) sum_parts(
    const float* BC_parts, const float* A_parts, const float* D_parts, const float* bias_parts,
    scalar* dB, scalar* dC, float* dA, float* dD, float* dbias,
    i64 batches, i64 length, i64 channels, i64 states, i64 workers, i64 time_parts) {
    i64 i = blockIdx.x * i64(256) + threadIdx.x;
    const i64 sequence = length * (2 * STATES);
    if (i < batches * sequence) {
        const i64 row = i / (2 * STATES);
        const int n = i % (2 * STATES);
        const float* from = BC_parts + i + i / sequence * (workers - 1) * sequence;
        float sum = 0.f;
#pragma unroll 8
        for (int w = 0; w < workers; ++w) sum += from[w * sequence];
        scalar* to = n < STATES ? dB : dC;
        if (n % STATES < states) {
#if DTYPE == 0
            to[row * states + n % STATES] = UNCUT * sum;
#else
            to[row * states + n % STATES] = static_cast<scalar>(pack(UNCUT * sum, 0.f));
#endif
        }
        return;
    }
    i -= batches * sequence;
    const i64 width = i < channels * states ? channels * states : channels;
    const float* from = A_parts;
    float* to = dA;
    if (i >= channels * states) {
        i -= channels * states;
        from = i < channels ? D_parts : bias_parts;
        to = i < channels ? dD : dbias;
        if (i >= channels) i -= channels;
        if (i >= channels || to == nullptr) return;
    }
    float sum = 0.f;
#pragma unroll 8
    for (int p = 0; p < time_parts; ++p) sum += from[p * width + i];
    to[i] = sum;
}
