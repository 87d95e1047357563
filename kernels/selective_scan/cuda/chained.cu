// Forward where few channels leave the GPU empty: see docs/kernels.md. Time is cut into chunks of TILE steps, each the work
// of one warp for its channels; the warps of a ring take them in turn. A warp walks through its chunk from a state of 0,
// keeping in registers what a state that enters would add to y. When the warp before has handed that state over, it adds
// it, and hands over its own. A block has RINGS rings of neighbouring channels; a unit is these, of one sequence.

static_assert(STATES == 16 && WARP_CHANNELS == 16, "tiles of activations and of states have one shape");
constexpr int TENSORS = 4 + GATED, RAW = TILE * 16;  // x, dt, B, C, z
constexpr int STEP = ALIGNED ? 16 / int(sizeof(scalar)) : 1, TENSOR_LANES = RAW / STEP < 32 ? RAW / STEP : 32;
constexpr int TOGETHER = 32 / TENSOR_LANES, STREAMS = (TENSORS + TOGETHER - 1) / TOGETHER;
constexpr int ROW_LANES = 16 / STEP, ROWS = TENSOR_LANES / ROW_LANES;
constexpr int SLOTS = WARPS / RINGS;  // warps of a ring

struct Warp {
    alignas(16) scalar raw[2][TENSORS][RAW];  // the tensors as they are: this chunk and the warp's next one
    union {
        struct {
            alignas(16) float delta[WARP_TILE];   // Δ
            alignas(16) float driven[WARP_TILE];  // Δ·x
            alignas(16) float B[RAW];
            alignas(16) float C[RAW];
        };
        alignas(16) float sums[STATE_LANES][WARP_TILE];  // C·h of the states of each lane of a channel
    };
    alignas(16) float resets[2][TILE];
    alignas(16) float state[CHANNELS * PER_LANE * 32];  // that enters the chunk, from the warp before
};
static_assert(sizeof(Warp) * WARPS == SHARED_BYTES, "variants.py counts the shared memory differently");

struct Rows {
    const scalar* from;
    i64 batch, time;  // strides
};

// A piece of a unit's time, and the chunk in it that is a warp's next one.
struct Piece {
    int index, batch, channel0, chunk, first, end;
};

// What a block does: so many chunks of the units' in a row. That is a unit or more, so only the last unit of a block may go
// on in another, the next one. The block begins with its part of that unit and ends with what is left of its first unit:
// by then the block before has long left the state in which this begins.
struct Share {
    int chunks, groups, head, first_unit, whole, tail, pieces;

    __device__ __forceinline__ Share(i64 begin, i64 end, int chunks_, int groups_) {
        chunks = chunks_;
        groups = groups_;
        head = end % chunks;   // chunks of the last unit, if it goes on
        tail = begin % chunks;  // chunks of the first unit that are the block before's
        first_unit = begin / chunks;
        whole = end / chunks - first_unit - (tail > 0);
        pieces = (head > 0) + whole + (tail > 0);
    }
    __device__ __forceinline__ Piece piece(int index, int skipped) const {
        const int n = index - (head > 0);  // of those after the head
        const bool is_tail = n == whole;
        const int unit = first_unit + (is_tail ? 0 : (n < 0 ? whole : n) + (tail > 0));
        const int first = is_tail ? tail : 0;
        return {index, unit / groups, unit % groups * (RINGS * WARP_CHANNELS), first + skipped, first, n < 0 ? head : chunks};
    }
};

// Between two neighbours: the one leaves something and goes on, the other waits for it.
__device__ __forceinline__ void left_for(int barrier) { asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void wait_for(int barrier) { asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory"); }

// Keeps a number in a register: the compiler would rather compute it again and again.
__device__ __forceinline__ int kept(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

__device__ __forceinline__ void to_floats(float* to, const scalar* from, int lane) {
#pragma unroll
    for (int i = 0; i < RAW; i += 32 * VECTOR) vector_at(to + i + lane * VECTOR) = load_vector(from + i + lane * VECTOR);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_chained(
    const scalar* x, i64 x_batch, i64 x_time, const scalar* dt, i64 dt_batch, i64 dt_time,
    const scalar* z, i64 z_batch, i64 z_time, const scalar* B, i64 B_batch, i64 B_time,
    const scalar* C, i64 C_batch, i64 C_time, const float* A, const float* D, const float* dt_bias,
    const int* seq_idx, i64 seq_batch, i64 seq_time, const float* initial_state,
    scalar* y, scalar* ungated, float* final_state, float* starts, int* ready,
    i64 length_, i64 channels_, i64 states_, i64 groups, i64 units, i64 blocks, i64 dt_softplus) {
    const int length = length_, channels = channels_, states = states_;
    extern __shared__ char memory[];
    const int lane = kept(threadIdx.x % 32), warp = threadIdx.x / 32, ring = warp % RINGS;
    const int slot = warp / RINGS, next_warp = slot + 1 < SLOTS ? warp + RINGS : ring;
    Warp& own = *reinterpret_cast<Warp*>(memory + warp * sizeof(Warp));
    // Where the next warp of the ring looks for the lane's states.
    float* const handed = reinterpret_cast<Warp*>(memory + kept(next_warp * sizeof(Warp) + lane * 16))->state;
    const int state0 = lane / CHANNEL_LANES * PER_LANE;   // the lane's first state
    const int lane_at = lane % CHANNEL_LANES * CHANNELS;  // its first channel in the unit
    const int chunks = (length + TILE - 1) / TILE;
    const i64 begin = units * chunks * blockIdx.x / blocks, end = units * chunks * (blockIdx.x + 1) / blocks;
    const Share share(begin, end, chunks, groups);

    // A lane copies its part of one tensor, or of every second one; `from` and `stride` are of those parts. Strides of time
    // are below 2^31, so that an address takes one multiplication.
    const int half = lane / TENSOR_LANES, part = lane % TENSOR_LANES, part_row = part / ROW_LANES;
    const int column = part % ROW_LANES * STEP;
    const Rows tensors[] = {
        {x, x_batch, x_time}, {dt, dt_batch, dt_time}, {B, B_batch, B_time}, {C, C_batch, C_time}, {z, z_batch, z_time}, {}};
    const scalar* from[STREAMS];
    int stride[STREAMS];
    Piece next;
    int left = end - begin;  // chunks of the block that this warp and those of its ring after it have not taken
    auto seek = [&](int index, int skipped) {
        next = share.piece(index, skipped);
        while (next.chunk >= next.end && next.index + 1 < share.pieces)
            next = share.piece(next.index + 1, next.chunk - next.end);
        next.channel0 += ring * WARP_CHANNELS;
        const i64 row = i64(next.chunk) * TILE + part_row;
#pragma unroll
        for (int i = 0; i < STREAMS; ++i) {
            const Rows rows = half == 0 ? tensors[i * TOGETHER] : tensors[i * TOGETHER + TOGETHER - 1];
            const bool of_states = i * TOGETHER >= 2 && (i + 1) * TOGETHER <= 4;
            from[i] = rows.from + next.batch * rows.batch + row * rows.time + (of_states ? 0 : next.channel0) + column;
            stride[i] = rows.time;
        }
    };
    auto fetch = [&](int buffer) {
        const int start = next.chunk * TILE, rows = length - start;
        const bool channels_exist = next.channel0 + column < channels, states_exist = column < states;
#pragma unroll
        for (int i = 0; i < STREAMS; ++i) {
            const int tensor = i * TOGETHER + half;
            const bool exist = i * TOGETHER >= 2 && (i + 1) * TOGETHER <= 4 ? states_exist : channels_exist;
#pragma unroll
            for (int k = 0; k < TILE; k += ROWS) {
                scalar* to = own.raw[buffer][tensor] + k * 16 + part * STEP;
                const scalar* piece = from[i] + k * i64(stride[i]);
                const bool valid = exist && k + part_row < rows;
                if ((i + 1) * TOGETHER > TENSORS && half > 0) break;
                if constexpr (ALIGNED)
                    copy_async<16>(to, piece, valid);
                else
                    *to = valid ? *piece : scalar(0);
            }
            from[i] += i64(SLOTS * TILE) * stride[i];
        }
        copies_commit();
        if constexpr (PACKED)
            load_resets<32>(own.resets[buffer], seq_idx + next.batch * seq_batch, seq_time, start, rows);
    };
    const int row0 = lane / ROW_VECTORS, vector_channel = lane % ROW_VECTORS * VECTOR;  // of the phases without states
    float a[CHANNELS][PER_LANE];
    Floats<VECTOR> bias, skip;  // D

    left -= slot;
    if (left <= 0) return;
    seek(0, slot);
    fetch(0);
    static_assert(EVEN_VECTORS && RAW % (32 * VECTOR) == 0);
    int buffer = 0;
    for (int known = -1; left > 0; left -= SLOTS, buffer ^= 1) {
        const Piece at = next;
        const int channel = at.channel0 + lane_at, rows = length - at.chunk * TILE;
        const scalar (*raw)[RAW] = own.raw[buffer];
        copies_wait();
        if (left > SLOTS) {
            next.chunk += SLOTS;
            if (next.chunk >= next.end) seek(next.index + 1, next.chunk - next.end);
            fetch(buffer ^ 1);
        }
        if (at.index != known) {
            known = at.index;
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
                const int which = at.channel0 + vector_channel + k;
                skip[k] = (D != nullptr && which < channels ? D[which] : 0.f) + 0.f;
                bias[k] = (dt_bias != nullptr && which < channels ? dt_bias[which] : 0.f) + 0.f;
            }
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
                for (int s = 0; s < PER_LANE; ++s) {
                    bool exists = channel + k < channels && state0 + s < states;
                    // Adding 0 waits for the load here, once.
                    a[k][s] = (exists ? A[i64(channel + k) * states + state0 + s] * LOG2E : 0.f) + 0.f;
                }
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < LANE_VECTORS; ++j) {
            const int i = j * 32 + lane, t = j * (32 / ROW_VECTORS) + row0;
            Floats<VECTOR> d = load_vector(raw[1] + i * VECTOR), value = load_vector(raw[0] + i * VECTOR);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
                d[k] += bias[k];
                if (dt_softplus) d[k] = softplus(d[k]);
                value[k] *= d[k];
            }
            vector_at(own.delta + i * VECTOR) = d;
            vector_at(own.driven + i * VECTOR) = value;
            // Past the end nothing changes: x and B are 0 there.
            if (rows < TILE && t >= rows) vector_at(own.delta + i * VECTOR) = Floats<VECTOR>{};
        }
        to_floats(own.B, raw[2], lane);
        to_floats(own.C, raw[3], lane);
        __syncwarp();

        // What a state of 0 gives: y, and the state after the chunk. What a state that enters adds to y is `carried` · it.
        float carried[TILE][CHANNELS][PER_LANE], sums[TILE][CHANNELS], h[CHANNELS][PER_LANE], decay[CHANNELS][PER_LANE];
#pragma unroll
        for (int t = 0; t < TILE; ++t) {
            Floats<CHANNELS> d = *reinterpret_cast<Floats<CHANNELS>*>(own.delta + t * WARP_CHANNELS + lane_at);
            Floats<CHANNELS> w = *reinterpret_cast<Floats<CHANNELS>*>(own.driven + t * WARP_CHANNELS + lane_at);
            float reset = PACKED ? own.resets[buffer][t] : 0.f;
#pragma unroll
            for (int s0 = 0; s0 < PER_LANE; s0 += 4) {
                Floats<4> b = *reinterpret_cast<Floats<4>*>(own.B + t * STATES + state0 + s0);
                Floats<4> c = *reinterpret_cast<Floats<4>*>(own.C + t * STATES + state0 + s0);
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int s = s0 + i;
                        float step = exp2_fast(PACKED ? fmaf(d[k], a[k][s], reset) : d[k] * a[k][s]);
                        h[k][s] = t == 0 ? w[k] * b[i] : fmaf(step, h[k][s], w[k] * b[i]);
                        sums[t][k] = s == 0 ? h[k][s] * c[i] : fmaf(h[k][s], c[i], sums[t][k]);
                        decay[k][s] = t == 0 ? step : step * decay[k][s];
                        carried[t][k][s] = c[i] * decay[k][s];
                    }
            }
        }
        float in[CHANNELS][PER_LANE];

        // At the first chunk of a piece, too, one waits for the other, which could otherwise leave a state twice.
        if (left != int(end - begin)) wait_for(warp);
        auto state_at = [&] { return (i64(at.batch) * channels + channel) * states + state0; };
        if (at.chunk > at.first) {
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
                for (int s = 0; s < PER_LANE; s += 4) {
                    Floats<4> given = *reinterpret_cast<Floats<4>*>(own.state + (k * PER_LANE + s) * 32 + lane * 4);
#pragma unroll
                    for (int i = 0; i < 4; ++i) in[k][s + i] = given[i];
                }
        } else {
            if (at.chunk > 0) {
                const int* entry = ready + (blockIdx.x - 1) * RINGS + ring;
                int item = 0;
                while (true) {
                    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(item) : "l"(entry) : "memory");
                    if (item != 0) break;
                }
            }
            const float* given = at.chunk > 0 ? final_state : initial_state;
            if (given != nullptr) given += state_at();
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
                for (int s = 0; s < PER_LANE; ++s) {
                    bool exists = given != nullptr && channel + k < channels && state0 + s < states;
                    in[k][s] = (exists ? given[k * states + s] : 0.f) + 0.f;
                }
        }
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
            for (int s = 0; s < PER_LANE; s += 4) {
                Floats<4> out;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    out[i] = h[k][s + i] = fmaf(decay[k][s + i], in[k][s + i], h[k][s + i]);
                }
                *reinterpret_cast<Floats<4>*>(handed + (k * PER_LANE + s) * 32) = out;
            }
        if (left > 1) left_for(next_warp);
        if (at.chunk + 1 == at.end) {
            float* to = final_state + state_at();
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
                for (int s = 0; s < PER_LANE; ++s)
                    if (channel + k < channels && state0 + s < states) to[k * states + s] = h[k][s];
            if (at.end < chunks) {
                __threadfence();
                __syncwarp();
                int* entry = ready + blockIdx.x * RINGS + ring;
                const int item = 1;
                if (lane == 0)
                    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(entry), "r"(item) : "memory");
            }
        }

        if (starts != nullptr && at.chunk % SAVE_EVERY == 0) {
            const int saved = (chunks + SAVE_EVERY - 1) / SAVE_EVERY;
            float* to = starts + ((i64(at.batch) * saved + at.chunk / SAVE_EVERY) * channels + channel) * STATES + state0;
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k)
                if (channel + k < channels)
#pragma unroll
                    for (int s = 0; s < PER_LANE; s += 4) {
                        Floats<4> out{in[k][s], in[k][s + 1], in[k][s + 2], in[k][s + 3]};
                        *reinterpret_cast<Floats<4>*>(to + k * STATES + s) = out;
                    }
        }
        __syncwarp();
#pragma unroll
        for (int t = 0; t < TILE; ++t)
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k)
#pragma unroll
                for (int s = 0; s < PER_LANE; ++s) sums[t][k] = fmaf(carried[t][k][s], in[k][s], sums[t][k]);
        // Every second lane of a channel swaps neighbouring rows: half a warp then writes to all banks of the memory.
        const int swap = lane / CHANNEL_LANES % 2 * WARP_CHANNELS;
        float* const even = own.sums[lane / CHANNEL_LANES] + lane_at + swap;
        float* const odd = own.sums[lane / CHANNEL_LANES] + lane_at + WARP_CHANNELS - swap;
#pragma unroll
        for (int t = 0; t < TILE; ++t) {
            Floats<CHANNELS> out;
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k) out[k] = sums[t][k];
            *reinterpret_cast<Floats<CHANNELS>*>((t % 2 ? odd : even) + t / 2 * 2 * WARP_CHANNELS) = out;
        }
        __syncwarp();

        const int exist = channels - at.channel0 - vector_channel;
#pragma unroll
        for (int j = 0; j < LANE_VECTORS; ++j) {
            const int i = j * 32 + lane, t = j * (32 / ROW_VECTORS) + row0;
            Floats<VECTOR> out{}, value = load_vector(raw[0] + i * VECTOR);
#pragma unroll
            for (int n = 0; n < STATE_LANES; ++n) {
                Floats<VECTOR> part = vector_at(own.sums[n] + (t ^ n % 2) * WARP_CHANNELS + vector_channel);
#pragma unroll
                for (int k = 0; k < VECTOR; ++k) out[k] = n == 0 ? part[k] : out[k] + part[k];
            }
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) out[k] = fmaf(skip[k], value[k], out[k]);
            const int valid = t < rows ? exist : 0;
            const int row = at.batch * length + at.chunk * TILE + t;  // fewer than 2^31 of them: see variants.py
            const i64 to = i64(row) * channels + (at.channel0 + vector_channel);
            if constexpr (GATED) {
                if (ungated != nullptr) store_vector(ungated + to, out, valid);
                Floats<VECTOR> gate = load_vector(raw[4] + i * VECTOR);
#pragma unroll
                for (int k = 0; k < VECTOR; ++k) out[k] *= gate[k] * sigmoid(gate[k]);
            }
            store_vector(y + to, out, valid);
        }
        __syncwarp();
    }
}
