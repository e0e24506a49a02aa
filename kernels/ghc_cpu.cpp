// Generalized Hyper-Connections on a CPU, forward and backward, every step of a token in one pass.
//
// For one token, H [n, d_b], K = m+n+m coefficient columns (Å | Â | ℬᵀ):
//
//   rstd_i = 1 / √(mean_d H_id² + ε)                      Eq. (12)
//   p      = rstd · H (gain · W / τ)                      [n, K],  W = (W_α | W_β), τ = √d_b
//   C      = S ∘ tanh(p) + static                         Eqs. (13), (14), S = (S_α | S_βᵀ), static = (A | Bᵀ)
//   x, carried = C[:, :m]ᵀ H, C[:, m:m+n]ᵀ H              width connection, Eq. (10)
//   H_next = C[:, m+n:] Z + carried                       depth connection, Eq. (10)
//
// Nothing but H and z is kept for the backward pass: p, tanh and C are recomputed there, which costs less than
// reading them back from memory. Only ℬᵀ [n, m] is written out, for `depth` needs it.
//
// How it is fast
// - One shared object a shape: m, n, d_b and the scalar type are macros, so every loop below has a constant length
//   and the compiler keeps the blocks of a product in registers.
// - Everything is a small product `C += A B` with the columns of B in vectors and the elements of A broadcast
//   (`product`), over a block of tokens that stays in the L1 cache. d_b or K is the innermost axis, as in memory:
//   the one product whose sum runs over d_b (the gradient of C) takes a transposed tile.
// - No torch headers: it compiles in seconds. GCC and clang vector extensions, no intrinsics: any architecture.
//
// Determinism: tokens are cut into chunks by their number alone; each chunk sums its parameter gradients into a
// buffer of its own, and the buffers are added in order. The bits do not depend on the number of threads.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if !defined(GHC_M) || !defined(GHC_N) || !defined(GHC_D) || !defined(GHC_SCALAR)
#error "define GHC_M, GHC_N, GHC_D (slot width d_b) and GHC_SCALAR (float or double)"
#endif

#define INLINE inline __attribute__((always_inline))

using T = GHC_SCALAR;
using Index = int64_t;

// ------------------------------------------------------------------------------------------------ sizes

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

constexpr int kWidest = kVectorBytes / int(sizeof(T));
constexpr int kNarrowest = 16 / int(sizeof(T));

// Lanes for an axis of `size`: the narrowest vectors among those that need the fewest of them.
constexpr int lanes_for(int size) {
    int lanes = kWidest;
    while (lanes > kNarrowest && (size + lanes / 2 - 1) / (lanes / 2) == (size + lanes - 1) / lanes) lanes /= 2;
    return lanes;
}
constexpr int round_up(int size, int to) { return (size + to - 1) / to * to; }
constexpr int min(int a, int b) { return a < b ? a : b; }
constexpr int max(int a, int b) { return a > b ? a : b; }

constexpr int M = GHC_M, N = GHC_N, D = GHC_D;
constexpr int MN = M + N;              // columns of A = (Å | Â)
constexpr int K = MN + M;              // and of (Å | Â | ℬᵀ)
constexpr int LD = lanes_for(D);       // lanes along d_b
constexpr int LK = lanes_for(K);       // lanes along the coefficient columns
constexpr int LM = lanes_for(M);       // lanes along m
constexpr int Dp = round_up(D, LD);    // the axes as tiles hold them, padded to whole vectors
constexpr int Kp = round_up(K, LK);
constexpr int MNp = round_up(MN, LK);  // ≤ Kp
constexpr int Mp = round_up(M, LM);
constexpr int TB = max(1, min(16, min(2048 / (N * Kp), 4096 / (N * Dp))));  // tokens a block: its tiles fit the L1 cache
constexpr bool kPadded = Dp != D;

template <int L> struct VectorOf {
    typedef T type __attribute__((vector_size(L * sizeof(T))));
};
template <int L> using Vec = typename VectorOf<L>::type;

template <int L> INLINE Vec<L> load(const T* p) {
    Vec<L> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <int L> INLINE void store(T* p, Vec<L> v) { std::memcpy(p, &v, sizeof v); }

using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <int L> struct BitsOf {
    typedef Integer type __attribute__((vector_size(L * sizeof(T))));
};

#if defined(__clang__)
#define SHUFFLE(L, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(L, a, b, ...) __builtin_shuffle(a, b, typename BitsOf<L>::type{__VA_ARGS__})
#endif

// Swaps the lanes of a that have bit W with the lanes of b that have not: one 2 × 2 step of a transposition.
template <int L, int W, int... I> INLINE void butterfly(Vec<L>& a, Vec<L>& b, std::integer_sequence<int, I...>) {
    const Vec<L> low = SHUFFLE(L, a, b, (I & W ? L + I - W : I)...);
    const Vec<L> high = SHUFFLE(L, a, b, (I & W ? L + I : I + W)...);
    a = low, b = high;
}

// Transposes L vectors in place.
template <int L, int W = 1> INLINE void transpose(Vec<L> (&rows)[L]) {
    if constexpr (W < L) {
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r)
            if (!(r & W)) butterfly<L, W>(rows[r], rows[r + W], std::make_integer_sequence<int, L>{});
        transpose<L, 2 * W>(rows);
    }
}

// out[r] = Σ of the lanes of rows[r], L of them together: the same steps, with an addition after each.
template <int L, int W = 1> INLINE Vec<L> lane_sums(Vec<L> (&rows)[L]) {
    if constexpr (W < L) {
#pragma GCC unroll 16
        for (int r = 0; r < L; r += 2 * W) {
            butterfly<L, W>(rows[r], rows[r + W], std::make_integer_sequence<int, L>{});
            rows[r] += rows[r + W];
        }
        return lane_sums<L, 2 * W>(rows);
    } else {
        return rows[0];
    }
}

// ------------------------------------------------------------------------------------------------ tanh

// tanh(x) = −e/(e + 2), e = expm1(−2|x|), sign restored. expm1 by −2|x| = k ln 2 + r, |r| ≤ ln 2 / 2:
// e = 2ᵏ q + (2ᵏ − 1), q = the Taylor sum of expm1(r). Relative error of a few units in the last place for every x,
// small ones too (where 1 − 2/(e²ˣ + 1) cancels). NaN stays NaN; |x| beyond the clamp is ±1 exactly.
template <class S> struct TanhConstants;
template <> struct TanhConstants<float> {
    static constexpr int degree = 7, mantissa = 23, bias = 127;
    static constexpr float clamp = 10.0f, shift = 12582912.0f;             // 1.5 · 2²³
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // 9 bits, and the rest
};
template <> struct TanhConstants<double> {
    static constexpr int degree = 14, mantissa = 52, bias = 1023;
    static constexpr double clamp = 20.0, shift = 6755399441055744.0;      // 1.5 · 2⁵²
    static constexpr double ln2_high = 0.6931471803691238, ln2_low = 1.9082149292705877e-10;
};

template <int L> INLINE Vec<L> tanh(Vec<L> x) {
    using Const = TanhConstants<T>;
    using Bits = typename BitsOf<L>::type;
    const Vec<L> zero = {};
    const Bits sign_bit = (Bits)(-zero);
    Vec<L> y = (Vec<L>)((Bits)x & ~sign_bit);
    y = y > Const::clamp ? zero + Const::clamp : y;  // false for NaN: NaN goes on
    y *= T(-2);
    const Vec<L> shifted = y * T(1.4426950408889634) + Const::shift;  // its low bits hold k
    const Vec<L> k = shifted - Const::shift;
    Vec<L> r = y - k * Const::ln2_high;
    r -= k * Const::ln2_low;
    T factor[Const::degree + 1] = {0, 1};  // 1/j!
#pragma GCC unroll 16
    for (int j = 2; j <= Const::degree; ++j) factor[j] = factor[j - 1] / T(j);
    Vec<L> q = zero + factor[Const::degree];
#pragma GCC unroll 16
    for (int j = Const::degree - 1; j >= 1; --j) q = q * r + factor[j];
    q *= r;
    const Bits exponent = ((Bits)shifted + Const::bias) << Const::mantissa;
    const Vec<L> power = (Vec<L>)exponent;  // 2ᵏ
    const Vec<L> e = power * q + (power - T(1));
    const Vec<L> result = -e / (e + T(2));
    return (Vec<L>)((Bits)result | ((Bits)x & sign_bit));
}

// ------------------------------------------------------------------------------------------------ products

// One block in registers: acc[r][c] += Σ_k a[r·AR + k·AK] · b[k·LDB + c·L … ].
template <int RB, int CB, int KK, int AR, int AK, int LDB, int L>
INLINE void block(const T* a, const T* b, Vec<L> (&acc)[RB][CB]) {
#pragma GCC unroll 4
    for (int k = 0; k < KK; ++k) {
        Vec<L> row[CB];
#pragma GCC unroll 8
        for (int c = 0; c < CB; ++c) row[c] = load<L>(b + k * LDB + c * L);
#pragma GCC unroll 32
        for (int r = 0; r < RB; ++r) {
            const T s = a[r * AR + k * AK];
#pragma GCC unroll 8
            for (int c = 0; c < CB; ++c) acc[r][c] += s * row[c];
        }
    }
}

// Calls body<RB, CB>(r, c) for register blocks that cover R rows and CV vectors of columns.
template <int R, int CV, int RB, int CB, class F> INLINE void each_block(F&& body) {
    constexpr int rows = R / RB * RB, columns = CV / CB * CB;
    for (int c = 0; c < columns; c += CB) {
        for (int r = 0; r < rows; r += RB) body.template operator()<RB, CB>(r, c);
        if constexpr (rows < R) body.template operator()<R - rows, CB>(rows, c);
    }
    if constexpr (columns < CV) {
        for (int r = 0; r < rows; r += RB) body.template operator()<RB, CV - columns>(r, columns);
        if constexpr (rows < R) body.template operator()<R - rows, CV - columns>(rows, columns);
    }
}

// Registers for a product of R rows by CV vectors: accumulators fill three quarters of them, and at least eight
// independent sums (where there are so many) hide the latency of a fused multiply-add.
template <int R, int CV> struct Blocking {
    static constexpr int CB = min(CV, 4);
    static constexpr int most = max(1, kRegisters * 3 / 4 / CB);
    static constexpr int pieces = (R + most - 1) / most;
    static constexpr int RB = (R + pieces - 1) / pieces;
};

// out [R, CV·L] (row stride LDO) = a b + start, a [R, KK] at strides (AR, AK), b [KK, CV·L] at row stride LDB,
// start laid out as out (and may be out), or null for zero.
template <int R, int CV, int KK, int AR, int AK, int LDB, int LDO, int L>
INLINE void product(const T* a, const T* b, T* out, const T* start = nullptr) {
    using B = Blocking<R, CV>;
    each_block<R, CV, B::RB, B::CB>([&]<int RB, int CB>(int r0, int c0) {
        Vec<L> acc[RB][CB];
        const int at = r0 * LDO + c0 * L;
#pragma GCC unroll 32
        for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < CB; ++c) acc[r][c] = start ? load<L>(start + at + r * LDO + c * L) : Vec<L>{};
        block<RB, CB, KK, AR, AK, LDB, L>(a + r0 * AR, b + c0 * L, acc);
#pragma GCC unroll 32
        for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < CB; ++c) store<L>(out + at + r * LDO + c * L, acc[r][c]);
    });
}

// tall [Dp, columns] = transpose of `first` rows of one array over those of another, [D] each at stride Dp; columns are
// padded with zeros to whole vectors of LC lanes.
template <int First, int Second, int LC> INLINE void transpose_tile(const T* first, const T* second, T* tall) {
    constexpr int L = min(LD, LC), columns = round_up(First + Second, LC);
#pragma GCC unroll 4
    for (int k = 0; k < columns; k += L)
        for (int d = 0; d < Dp; d += L) {
            Vec<L> rows[L];
#pragma GCC unroll 16
            for (int r = 0; r < L; ++r) {
                const int row = k + r;
                rows[r] = row < First            ? load<L>(first + row * Dp + d)
                          : row < First + Second ? load<L>(second + (row - First) * Dp + d)
                                                 : Vec<L>{};
            }
            transpose<L>(rows);
#pragma GCC unroll 16
            for (int r = 0; r < L; ++r) store<L>(tall + (d + r) * columns + k, rows[r]);
        }
}

// ------------------------------------------------------------------------------------------------ threads

// The OpenMP runtime that the process already has (torch's), found when this file is loaded; no runtime of our own,
// since two pools of spinning threads would fight for the same cores. Where there is none: one thread.
#if defined(__ELF__)
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
#endif

// Tokens a chunk: by the number of tokens alone; whole blocks; at most 64 chunks (each has buffers of its own).
static Index chunk_size(Index tokens) {
    const Index least = TB * max(1, 64 / TB), share = (tokens + 63) / 64;
    return share <= least ? least : (share + TB - 1) / TB * TB;
}
static Index chunk_count(Index tokens) { return (tokens + chunk_size(tokens) - 1) / chunk_size(tokens); }

// Calls body(c, first, last) for chunk c, the tokens first … last − 1, on up to `threads` threads.
template <class F> static void for_each_chunk(Index tokens, int threads, F&& body) {
    struct Job {
        F& body;
        Index tokens, size, chunks;
        std::atomic<Index> next;

        static void work(void* self) {
            Job& job = *static_cast<Job*>(self);
            for (Index c; (c = job.next.fetch_add(1, std::memory_order_relaxed)) < job.chunks;) {
                const Index last = (c + 1) * job.size;
                job.body(c, c * job.size, last < job.tokens ? last : job.tokens);
            }
        }
    } job{body, tokens, chunk_size(tokens), chunk_count(tokens), {0}};
#if defined(__ELF__)
    if (threads > 1 && job.chunks > 1 && GOMP_parallel) {
        GOMP_parallel(Job::work, &job, unsigned(threads), 0);
        return;
    }
#endif
    Job::work(&job);
}

struct Buffer {  // aligned scratch memory
    T* data;
    explicit Buffer(Index count) {
        const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
        data = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (!data) std::abort();
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
};

// One sum of `Size` numbers a chunk, and their total in the order of the chunks.
template <int Size> struct PartialSums {
    static constexpr int kEach = round_up(Size, 64 / int(sizeof(T)));  // no cache line belongs to two threads
    Index chunks;
    Buffer buffer;
    explicit PartialSums(Index tokens) : chunks(chunk_count(tokens)), buffer((chunks ? chunks : 1) * kEach) {}
    T* of(Index c) { return buffer.data + c * kEach; }
    const T* total() {
        T* first = of(0);
        if (!chunks) std::memset(first, 0, sizeof(T) * Size);
        for (Index c = 1; c < chunks; ++c)
            for (int j = 0; j < Size; ++j) first[j] += of(c)[j];
        return first;
    }
};

// ------------------------------------------------------------------------------------------------ tiles

// Tokens t0 … of a [tokens, ROWS, D] array as [TB, ROWS, Dp]: in place where nothing has to be padded, otherwise a copy
// in `tile` with zeros for the padding of d_b and for the tokens beyond the last.
template <int ROWS> INLINE const T* tile_in(const T* array, Index t0, int count, T* tile) {
    if (!kPadded && count == TB) return array + t0 * ROWS * D;
    const T* from = array + t0 * ROWS * D;
    if (kPadded || count < TB) std::memset(tile, 0, sizeof(T) * TB * ROWS * Dp);
    for (int r = 0; r < count * ROWS; ++r) std::memcpy(tile + r * Dp, from + r * D, sizeof(T) * D);
    return tile;
}
// The other way: where results go, and the copy back of what was asked for.
template <int ROWS> INLINE T* tile_out(T* array, Index t0, int count, T* tile) {
    return !kPadded && count == TB ? array + t0 * ROWS * D : tile;
}
template <int ROWS> INLINE void tile_done(T* array, Index t0, int count, const T* tile) {
    if (!kPadded && count == TB) return;
    for (int r = 0; r < count * ROWS; ++r) std::memcpy(array + (t0 * ROWS + r) * D, tile + r * Dp, sizeof(T) * D);
}

#define TILE(name, count) alignas(64) T name[count]

// ------------------------------------------------------------------------------------------------ dynamic width

// The parameters, laid out for the products. Columns: Å, Â, ℬᵀ, zeros up to Kp.
struct Parameters {
    TILE(wide, D* Kp);    // gain · W / τ        [D, Kp]
    TILE(tall, K* Dp);    // its transpose       [K, Dp]
    TILE(scale, N* Kp);   // S_α | S_βᵀ          [N, Kp]
    TILE(fixed, N* Kp);   // A | Bᵀ              [N, Kp]
    T eps;
};

static void lay_out(Parameters& p, const T* A, const T* B, const T* W_alpha, const T* W_beta, const T* S_alpha,
                    const T* S_beta, const T* gain, double eps) {
    std::memset(&p, 0, sizeof p);
    const T tau = std::sqrt(T(D));
    for (int d = 0; d < D; ++d)
        for (int k = 0; k < K; ++k) {
            const T w = k < MN ? W_alpha[d * MN + k] : W_beta[d * M + k - MN];
            p.wide[d * Kp + k] = p.tall[k * Dp + d] = gain[d] * w / tau;
        }
    for (int i = 0; i < N; ++i)
        for (int k = 0; k < K; ++k) {
            p.scale[i * Kp + k] = k < MN ? S_alpha[i * MN + k] : S_beta[(k - MN) * N + i];
            p.fixed[i * Kp + k] = k < MN ? A[i * MN + k] : B[(k - MN) * N + i];
        }
    p.eps = T(eps);
}

constexpr int kRows = round_up(TB * N, LD * LK);  // slots of a block, in whole vectors of either kind

// rstd of every slot of a block, Eq. (12).
INLINE void reciprocal_deviation(const T* h, T eps, T* rstd) {
    for (int r0 = 0; r0 < TB * N; r0 += LD) {
        Vec<LD> squares[LD] = {};
#pragma GCC unroll 16
        for (int r = 0; r < LD; ++r) {
            if (r0 + r >= TB * N) break;
            for (int v = 0; v < Dp; v += LD) {
                const Vec<LD> x = load<LD>(h + (r0 + r) * Dp + v);
                squares[r] += x * x;
            }
        }
        const Vec<LD> mean = lane_sums<LD>(squares) / T(D) + eps;
        store<LD>(rstd + r0, mean);
    }
    for (int r = 0; r < TB * N; ++r) rstd[r] = T(1) / std::sqrt(rstd[r]);
}

static void width_forward_chunk(const Parameters& p, const T* H, T* x, T* carried, T* Bt, Index first, Index last) {
    TILE(h_tile, TB * N * Dp);
    TILE(x_tile, TB * M * Dp);
    TILE(c_tile, TB * N * Dp);
    TILE(coef, TB * N * Kp);
    TILE(rstd, kRows);
    for (Index t0 = first; t0 < last; t0 += TB) {
        const int count = last - t0 < TB ? int(last - t0) : TB;
        const T* h = tile_in<N>(H, t0, count, h_tile);
        reciprocal_deviation(h, p.eps, rstd);
        product<TB * N, Kp / LK, D, Dp, 1, Kp, Kp, LK>(h, p.wide, coef);
        for (int i = 0; i < N; ++i)
            for (int v = 0; v < Kp; v += LK) {
                const Vec<LK> scale = load<LK>(p.scale + i * Kp + v), fixed = load<LK>(p.fixed + i * Kp + v);
                for (int t = 0; t < TB; ++t) {
                    T* c = coef + (t * N + i) * Kp + v;
                    store<LK>(c, scale * tanh<LK>(load<LK>(c) * rstd[t * N + i]) + fixed);
                }
            }
        T* x_out = tile_out<M>(x, t0, count, x_tile);
        T* c_out = tile_out<N>(carried, t0, count, c_tile);
        for (int t = 0; t < count; ++t) {
            const T *ht = h + t * N * Dp, *ct = coef + t * N * Kp;
            product<M, Dp / LD, N, 1, Kp, Dp, Dp, LD>(ct, ht, x_out + t * M * Dp);
            product<N, Dp / LD, N, 1, Kp, Dp, Dp, LD>(ct + M, ht, c_out + t * N * Dp);
            for (int i = 0; i < N; ++i)
                std::memcpy(Bt + ((t0 + t) * N + i) * M, ct + i * Kp + MN, sizeof(T) * M);
        }
        tile_done<M>(x, t0, count, x_tile);
        tile_done<N>(carried, t0, count, c_tile);
    }
}

// Gradient sums of one chunk of tokens, in the layout of `Parameters`.
struct Gradients {
    TILE(wide, D* Kp);
    TILE(scale, N* Kp);
    TILE(fixed, N* Kp);
};

// With G = (gx | g_carried) the gradients of the m+n mixed rows, E = (H Gᵀ | g_ℬᵀ) that of C:
//   g_S += E ∘ tanh p,  g_static += E,  e = E ∘ S ∘ (1 − tanh² p) ∘ rstd
//   g_(gain·W/τ) += Hᵀ e,   g_H = C G + e (gain·W/τ)ᵀ − rstd²/d_b · (Σ_k e · HW) · H
static void width_backward_chunk(const Parameters& p, const T* H, const T* gx, const T* gc, const T* gBt, T* gH,
                                 Gradients& sums, Index first, Index last) {
    TILE(h_tile, TB * N * Dp);
    TILE(x_tile, TB * M * Dp);
    TILE(c_tile, TB * N * Dp);
    TILE(o_tile, TB * N * Dp);
    TILE(coef, TB * N * Kp);   // H W, then C
    TILE(error, TB * N * Kp);  // E, then e
    TILE(g_tall, Dp * MNp);    // Gᵀ of one token
    TILE(rstd, kRows);
    TILE(pull, TB * N * LK);   // lanes of Σ_k e · HW, then −rstd²/d_b times their sum
    std::memset(&sums, 0, sizeof sums);
    for (Index t0 = first; t0 < last; t0 += TB) {
        const int count = last - t0 < TB ? int(last - t0) : TB;
        const T* h = tile_in<N>(H, t0, count, h_tile);
        const T* x = tile_in<M>(gx, t0, count, x_tile);
        const T* c = tile_in<N>(gc, t0, count, c_tile);
        reciprocal_deviation(h, p.eps, rstd);
        product<TB * N, Kp / LK, D, Dp, 1, Kp, Kp, LK>(h, p.wide, coef);
        if (Kp > MNp || count < TB) std::memset(error, 0, sizeof error);
        for (int t = 0; t < count; ++t) {
            transpose_tile<M, N, LK>(x + t * M * Dp, c + t * N * Dp, g_tall);
            product<N, MNp / LK, D, Dp, 1, MNp, Kp, LK>(h + t * N * Dp, g_tall, error + t * N * Kp);
            for (int i = 0; i < N; ++i)
                std::memcpy(error + (t * N + i) * Kp + MN, gBt + ((t0 + t) * N + i) * M, sizeof(T) * M);
        }
        for (int i = 0; i < N; ++i) {
            for (int v = 0; v < Kp; v += LK) {
                const Vec<LK> scale = load<LK>(p.scale + i * Kp + v), fixed = load<LK>(p.fixed + i * Kp + v);
                Vec<LK> g_scale = load<LK>(sums.scale + i * Kp + v), g_fixed = load<LK>(sums.fixed + i * Kp + v);
                for (int t = 0; t < count; ++t) {  // never the tokens beyond the last: rstd may be infinite there
                    const int row = t * N + i;
                    T *cp = coef + row * Kp + v, *ep = error + row * Kp + v;
                    const Vec<LK> hw = load<LK>(cp), E = load<LK>(ep);
                    const Vec<LK> th = tanh<LK>(hw * rstd[row]);
                    g_scale += E * th;
                    g_fixed += E;
                    store<LK>(cp, scale * th + fixed);
                    const Vec<LK> e = E * scale * (T(1) - th * th) * rstd[row];
                    store<LK>(ep, e);
                    store<LK>(pull + row * LK, v ? load<LK>(pull + row * LK) + e * hw : e * hw);
                }
                store<LK>(sums.scale + i * Kp + v, g_scale);
                store<LK>(sums.fixed + i * Kp + v, g_fixed);
            }
        }
        for (int r0 = 0; r0 < count * N; r0 += LK) {
            Vec<LK> lanes[LK];
#pragma GCC unroll 16
            for (int r = 0; r < LK; ++r) lanes[r] = r0 + r < count * N ? load<LK>(pull + (r0 + r) * LK) : Vec<LK>{};
            const Vec<LK> deviation = load<LK>(rstd + r0);
            store<LK>(pull + r0, lane_sums<LK>(lanes) * deviation * deviation / T(-D));
        }
        T* out = tile_out<N>(gH, t0, count, o_tile);
        for (int t = 0; t < count; ++t) {
            using B = Blocking<N, Dp / LD>;
            each_block<N, Dp / LD, B::RB, B::CB>([&]<int RB, int CB>(int r0, int c0) {
                const int row = t * N + r0, column = c0 * LD;
                Vec<LD> acc[RB][CB];
#pragma GCC unroll 32
                for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
                    for (int b = 0; b < CB; ++b)
                        acc[r][b] = pull[row + r] * load<LD>(h + (row + r) * Dp + column + b * LD);
                block<RB, CB, M, Kp, 1, Dp, LD>(coef + row * Kp, x + t * M * Dp + column, acc);
                block<RB, CB, N, Kp, 1, Dp, LD>(coef + row * Kp + M, c + t * N * Dp + column, acc);
                block<RB, CB, K, Kp, 1, Dp, LD>(error + row * Kp, p.tall + column, acc);
#pragma GCC unroll 32
                for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
                    for (int b = 0; b < CB; ++b) store<LD>(out + (row + r) * Dp + column + b * LD, acc[r][b]);
            });
        }
        tile_done<N>(gH, t0, count, o_tile);
        product<D, Kp / LK, TB * N, 1, Dp, Kp, Kp, LK>(h, error, sums.wide, sums.wide);
    }
}

// Depth connection. Matrix element (slot i, segment j) is at i·AR + j·AK: one ℬᵀ [n, m] a token, or (Shared) one
// static B [m, n] for all.
template <bool Shared> struct DepthMatrix {
    static constexpr int AR = Shared ? 1 : M, AK = Shared ? N : 1;
    const T* data;
    INLINE const T* of(Index token) const { return Shared ? data : data + token * N * M; }
};

// H_next = Bᵀ Z + carried.
template <bool Shared>
static void depth_forward_chunk(const T* z, DepthMatrix<Shared> B, const T* carried, T* out, Index first, Index last) {
    TILE(z_tile, TB * M * Dp);
    TILE(c_tile, TB * N * Dp);
    TILE(o_tile, TB * N * Dp);
    for (Index t0 = first; t0 < last; t0 += TB) {
        const int count = last - t0 < TB ? int(last - t0) : TB;
        const T* zt = tile_in<M>(z, t0, count, z_tile);
        const T* ct = tile_in<N>(carried, t0, count, c_tile);
        T* ot = tile_out<N>(out, t0, count, o_tile);
        for (int t = 0; t < count; ++t)
            product<N, Dp / LD, M, B.AR, B.AK, Dp, Dp, LD>(B.of(t0 + t), zt + t * M * Dp, ot + t * N * Dp,
                                                           ct + t * N * Dp);
        tile_done<N>(out, t0, count, o_tile);
    }
}

// g_z = B g, and g_Bᵀ = g Zᵀ [n, Mp], of each token (gBt [tokens, n, m]) or (Shared) summed over the chunk (gBt [n, Mp]).
// The gradient of `carried` is g itself.
template <bool Shared>
static void depth_backward_chunk(const T* z, DepthMatrix<Shared> B, const T* g, T* gz, T* gBt, Index first, Index last) {
    TILE(z_tile, TB * M * Dp);
    TILE(g_tile, TB * N * Dp);
    TILE(o_tile, TB * M * Dp);
    TILE(z_tall, Dp * Mp);
    TILE(b_tile, N * Mp) = {};
    for (Index t0 = first; t0 < last; t0 += TB) {
        const int count = last - t0 < TB ? int(last - t0) : TB;
        const T* zt = tile_in<M>(z, t0, count, z_tile);
        const T* gt = tile_in<N>(g, t0, count, g_tile);
        T* ot = tile_out<M>(gz, t0, count, o_tile);
        for (int t = 0; t < count; ++t) {
            const T* g_token = gt + t * N * Dp;
            product<M, Dp / LD, N, B.AK, B.AR, Dp, Dp, LD>(B.of(t0 + t), g_token, ot + t * M * Dp);
            transpose_tile<M, 0, LM>(zt + t * M * Dp, nullptr, z_tall);
            product<N, Mp / LM, D, Dp, 1, Mp, Mp, LM>(g_token, z_tall, b_tile, Shared ? b_tile : nullptr);
            if constexpr (!Shared)
                for (int i = 0; i < N; ++i) std::memcpy(gBt + ((t0 + t) * N + i) * M, b_tile + i * Mp, sizeof(T) * M);
        }
        tile_done<M>(gz, t0, count, o_tile);
    }
    if constexpr (Shared) std::memcpy(gBt, b_tile, sizeof b_tile);
}

// ------------------------------------------------------------------------------------------------ static width

// x, carried = Åᵀ H, Âᵀ H with one A [n, m+n] for all tokens.
static void static_width_forward_chunk(const T* H, const T* A, T* x, T* carried, Index first, Index last) {
    TILE(h_tile, TB * N * Dp);
    TILE(x_tile, TB * M * Dp);
    TILE(c_tile, TB * N * Dp);
    for (Index t0 = first; t0 < last; t0 += TB) {
        const int count = last - t0 < TB ? int(last - t0) : TB;
        const T* h = tile_in<N>(H, t0, count, h_tile);
        T* x_out = tile_out<M>(x, t0, count, x_tile);
        T* c_out = tile_out<N>(carried, t0, count, c_tile);
        for (int t = 0; t < count; ++t) {
            product<M, Dp / LD, N, 1, MN, Dp, Dp, LD>(A, h + t * N * Dp, x_out + t * M * Dp);
            product<N, Dp / LD, N, 1, MN, Dp, Dp, LD>(A + M, h + t * N * Dp, c_out + t * N * Dp);
        }
        tile_done<M>(x, t0, count, x_tile);
        tile_done<N>(carried, t0, count, c_tile);
    }
}

// With G = (gx | g_carried): g_H = A G, g_A [n, MNp] += H Gᵀ.
static void static_width_backward_chunk(const T* H, const T* A, const T* gx, const T* gc, T* gH, T* gA, Index first,
                                        Index last) {
    TILE(h_tile, TB * N * Dp);
    TILE(x_tile, TB * M * Dp);
    TILE(c_tile, TB * N * Dp);
    TILE(o_tile, TB * N * Dp);
    TILE(g_tall, Dp * MNp);
    std::memset(gA, 0, sizeof(T) * N * MNp);
    for (Index t0 = first; t0 < last; t0 += TB) {
        const int count = last - t0 < TB ? int(last - t0) : TB;
        const T* h = tile_in<N>(H, t0, count, h_tile);
        const T* x = tile_in<M>(gx, t0, count, x_tile);
        const T* c = tile_in<N>(gc, t0, count, c_tile);
        T* out = tile_out<N>(gH, t0, count, o_tile);
        for (int t = 0; t < count; ++t) {
            transpose_tile<M, N, LK>(x + t * M * Dp, c + t * N * Dp, g_tall);
            product<N, MNp / LK, D, Dp, 1, MNp, MNp, LK>(h + t * N * Dp, g_tall, gA, gA);
            T* o = out + t * N * Dp;
            product<N, Dp / LD, M, MN, 1, Dp, Dp, LD>(A, x + t * M * Dp, o);
            product<N, Dp / LD, N, MN, 1, Dp, Dp, LD>(A + M, c + t * N * Dp, o, o);
        }
        tile_done<N>(gH, t0, count, o_tile);
    }
}

// ------------------------------------------------------------------------------------------------ entry points

// All arrays are contiguous: H, carried [tokens, n, d_b], x, z [tokens, m, d_b], Bt [tokens, n, m],
// A, S_alpha [n, m+n], B, S_beta [m, n], W_alpha [d_b, m+n], W_beta [d_b, m], gain [d_b]; g… are gradients.

extern "C" void ghc_dynamic_width(Index tokens, int threads, double eps, const T* H, const T* A, const T* B,
                                  const T* W_alpha, const T* W_beta, const T* S_alpha, const T* S_beta, const T* gain,
                                  T* x, T* carried, T* Bt) {
    Buffer memory(sizeof(Parameters) / sizeof(T));
    Parameters& p = *reinterpret_cast<Parameters*>(memory.data);
    lay_out(p, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps);
    for_each_chunk(tokens, threads, [&](Index, Index first, Index last) {
        width_forward_chunk(p, H, x, carried, Bt, first, last);
    });
}

extern "C" void ghc_dynamic_width_backward(Index tokens, int threads, double eps, const T* H, const T* A, const T* B,
                                           const T* W_alpha, const T* W_beta, const T* S_alpha, const T* S_beta,
                                           const T* gain, const T* gx, const T* gc, const T* gBt, T* gH, T* gA, T* gB,
                                           T* gW_alpha, T* gW_beta, T* gS_alpha, T* gS_beta, T* g_gain) {
    Buffer memory(sizeof(Parameters) / sizeof(T));
    Parameters& p = *reinterpret_cast<Parameters*>(memory.data);
    lay_out(p, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps);
    PartialSums<sizeof(Gradients) / sizeof(T)> partial(tokens);
    for_each_chunk(tokens, threads, [&](Index c, Index first, Index last) {
        width_backward_chunk(p, H, gx, gc, gBt, gH, *reinterpret_cast<Gradients*>(partial.of(c)), first, last);
    });
    const Gradients* sums = reinterpret_cast<const Gradients*>(partial.total());

    const T tau = std::sqrt(T(D));
    for (int d = 0; d < D; ++d) {  // from gain · W / τ to gain and W
        T g = 0;
        for (int k = 0; k < K; ++k) {
            const T gw = sums->wide[d * Kp + k] / tau;
            T& g_out = k < MN ? gW_alpha[d * MN + k] : gW_beta[d * M + k - MN];
            g_out = gw * gain[d];
            g += gw * (k < MN ? W_alpha[d * MN + k] : W_beta[d * M + k - MN]);
        }
        g_gain[d] = g;
    }
    for (int i = 0; i < N; ++i)
        for (int k = 0; k < K; ++k) {
            (k < MN ? gS_alpha[i * MN + k] : gS_beta[(k - MN) * N + i]) = sums->scale[i * Kp + k];
            (k < MN ? gA[i * MN + k] : gB[(k - MN) * N + i]) = sums->fixed[i * Kp + k];
        }
}

// Bt [tokens, n, m] from `ghc_dynamic_width`.
extern "C" void ghc_dynamic_depth(Index tokens, int threads, const T* z, const T* Bt, const T* carried, T* out) {
    for_each_chunk(tokens, threads, [&](Index, Index first, Index last) {
        depth_forward_chunk<false>(z, {Bt}, carried, out, first, last);
    });
}

extern "C" void ghc_dynamic_depth_backward(Index tokens, int threads, const T* z, const T* Bt, const T* g, T* gz,
                                           T* gBt) {
    for_each_chunk(tokens, threads, [&](Index, Index first, Index last) {
        depth_backward_chunk<false>(z, {Bt}, g, gz, gBt, first, last);
    });
}

extern "C" void ghc_static_width(Index tokens, int threads, const T* H, const T* A, T* x, T* carried) {
    for_each_chunk(tokens, threads, [&](Index, Index first, Index last) {
        static_width_forward_chunk(H, A, x, carried, first, last);
    });
}

extern "C" void ghc_static_width_backward(Index tokens, int threads, const T* H, const T* A, const T* gx, const T* gc,
                                          T* gH, T* gA) {
    PartialSums<N * MNp> sums(tokens);
    for_each_chunk(tokens, threads, [&](Index c, Index first, Index last) {
        static_width_backward_chunk(H, A, gx, gc, gH, sums.of(c), first, last);
    });
    const T* total = sums.total();
    for (int i = 0; i < N; ++i) std::memcpy(gA + i * MN, total + i * MNp, sizeof(T) * MN);
}

extern "C" void ghc_static_depth(Index tokens, int threads, const T* z, const T* B, const T* carried, T* out) {
    for_each_chunk(tokens, threads, [&](Index, Index first, Index last) {
        depth_forward_chunk<true>(z, {B}, carried, out, first, last);
    });
}

extern "C" void ghc_static_depth_backward(Index tokens, int threads, const T* z, const T* B, const T* g, T* gz, T* gB) {
    PartialSums<N * Mp> sums(tokens);
    for_each_chunk(tokens, threads, [&](Index c, Index first, Index last) {
        depth_backward_chunk<true>(z, {B}, g, gz, sums.of(c), first, last);
    });
    const T* total = sums.total();
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < M; ++j) gB[j * N + i] = total[i * Mp + j];
}
