// Runs the emulated kernel on random rows and compares every result with float64.
//
//     emulate SEED CASES small|large [MUTANT]
//
// "small" draws vocabularies up to 6,000 and small multiprocessors, so that clusters of two and four blocks and rows that
// do not fit into shared memory occur; "large" draws real vocabularies and the limits of an H200. Exit status 1 on a
// mismatch; abort on a fault that the emulator finds.
#include "kernel.inc"

#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

template <typename T>
struct Kind;
template <>
struct Kind<float> {
  static constexpr int id = 0;
  static constexpr double eps = 1.8e-7, tiny = 4e-38;  // three half ulps of a product and exp; subnormals are 0
  static float from(double x) { return static_cast<float>(x); }
  static double to(float x) { return x; }
};
template <>
struct Kind<__nv_bfloat16> {
  static constexpr int id = 1;
  static constexpr double eps = 1. / 256, tiny = 4e-38;
  static __nv_bfloat16 from(double x) { return __float2bfloat16_rn(static_cast<float>(x)); }
  static double to(__nv_bfloat16 x) { return __bfloat162float(x); }
};
template <>
struct Kind<__half> {
  static constexpr int id = 2;
  static constexpr double eps = 1. / 2048, tiny = 6e-8;
  static __half from(double x) { return __float2half_rn(static_cast<float>(x)); }
  static double to(__half x) { return __half2float(x); }
};

std::mt19937_64 draw;
double uniform() { return std::uniform_real_distribution<double>(0, 1)(draw); }
double normal() { return std::normal_distribution<double>()(draw); }
long pick(long n) { return static_cast<long>(draw() % n); }

struct Case {
  long rows, V, padding, misalign;
  int style;  // of the logits, see fill()
  bool weights, gradient, want_loss;
  float softcap = 0, z_loss = 0, smoothing = 0;
};

struct Totals {
  long rows = 0, not_finite = 0, dead = 0, mismatches = 0;
  double nll = 0, dz = 0;
} totals;

constexpr float UNTOUCHED = 777;

template <typename T>
class Check {
  using K = Kind<T>;

 public:
  explicit Check(const Case& drawn)
      : c(drawn),
        stride(c.V + c.padding),
        // heap blocks of the exact size, so that ASan finds the first byte before and after
        storage((c.misalign + (c.rows - 1) * stride + c.V + (c.rows > 1 ? 0 : c.padding)) * sizeof(T)),
        logits(reinterpret_cast<T*>(storage.data()) + c.misalign),
        length(c.rows + 3 + pick(5)),
        positions(c.rows),
        targets(length, 0),
        weights(length, 1.0f),
        nll(length, UNTOUCHED),
        loss(length, UNTOUCHED),
        correct(length, 77) {
    std::vector<long> all(length);
    for (long i = 0; i < length; ++i) all[i] = i;
    std::shuffle(all.begin(), all.end(), draw);
    for (long r = 0; r < c.rows; ++r) positions[r] = all[r];
    std::memset(storage.data(), 0x5a, storage.size());  // the padding must keep this
    for (long r = 0; r < c.rows; ++r) fill(r);
    before.assign(storage.begin(), storage.end());
  }

  void run() {
    const int error = delib_fast_softmax_gradient(
        logits, K::id, c.rows, c.V, stride, positions.data(), targets.data(), c.weights ? weights.data() : nullptr,
        nll.data(), c.want_loss ? loss.data() : nullptr, correct.data(), -100, c.softcap, c.z_loss, c.smoothing,
        c.gradient, nullptr);
    if (error) emu::fail("the launch failed");
    std::vector<bool> listed(length, false);
    for (long r = 0; r < c.rows; ++r) listed[positions[r]] = true, check_row(r);
    for (long i = 0; i < length; ++i)
      if (!listed[i] && (nll[i] != UNTOUCHED || loss[i] != UNTOUCHED || correct[i] != 77))
        complain("a position that was not listed", -1, i, nll[i], UNTOUCHED);
    for (long r = 0; r + 1 < c.rows; ++r)
      if (std::memcmp(logits + r * stride + c.V, original(r) + c.V, c.padding * sizeof(T)))
        complain("padding was written", r, c.V, 0, 0);
  }

 private:
  void fill(long r) {
    const double spread = c.style == 0 ? 2 : c.style == 1 ? 30 : c.style == 2 ? 0 : 3;
    T* row = logits + r * stride;
    const long p = positions[r];
    for (long v = 0; v < c.V; ++v) {
      double z = spread * normal();
      if (c.style == 3 && uniform() < 0.5) z = -INFINITY;
      if (c.style == 4) z = uniform() < 0.001 ? 60000 * (uniform() - .5) : normal();
      row[v] = K::from(z);
    }
    targets[p] = c.style == 2 && pick(2) ? 0 : pick(c.V);  // of equal logits, the first is the argmax
    if (c.style == 5) {
      if (pick(2)) row[targets[p]] = K::from(25 + 10 * normal());  // a confident target
      if (pick(6) == 0) row[pick(c.V)] = K::from(NAN);
      if (pick(9) == 0) row[pick(c.V)] = K::from(INFINITY);
    }
    if (c.style == 3 && pick(5) == 0)
      for (long v = 0; v < c.V; ++v) row[v] = K::from(-INFINITY);
    if (pick(7) == 0) targets[p] = -100;
    if (pick(23) == 0) targets[p] = c.V + pick(3);
    if (pick(23) == 0) targets[p] = -1 - pick(3);
    if (c.weights) weights[p] = pick(6) ? static_cast<float>(2 * uniform() - .3) : 0.0f;
  }

  const T* original(long r) const { return reinterpret_cast<const T*>(before.data()) + c.misalign + r * stride; }

  void complain(const char* what, long r, long v, double ours, double exact) const {
    if (++totals.mismatches <= 5)
      std::printf("MISMATCH %s: dtype %d V %ld padding %ld misaligned by %ld style %d row %ld entry %ld: %.9g, exact "
                  "%.9g (softcap %g z-loss %g smoothing %g)\n",
                  what, K::id, c.V, c.padding, c.misalign, c.style, r, v, ours, exact, c.softcap, c.z_loss, c.smoothing);
  }

  void check_row(long r) {
    const long p = positions[r], target = targets[p];
    const T *row = logits + r * stride, *was = original(r);
    const double weight = c.weights ? weights[p] : 1;
    ++totals.rows;
    if (!c.gradient && std::memcmp(row, was, c.V * sizeof(T))) complain("logits were written", r, 0, 0, 0);
    if (target == -100 || weight == 0) {
      ++totals.dead;
      if (nll[p] != 0 || correct[p] != 0 || (c.want_loss && loss[p] != 0)) complain("unsupervised", r, 0, nll[p], 0);
      for (long v = 0; v < c.V && c.gradient; ++v)
        if (K::to(row[v]) != 0) complain("gradient of an unsupervised row", r, v, K::to(row[v]), 0);
      return;
    }
    std::vector<double> x(c.V);
    double max = -INFINITY, sum = 0, total = 0;
    long argmax = -1;
    float top = -INFINITY;
    bool nan = false;
    for (long v = 0; v < c.V; ++v) {
      const float z = static_cast<float>(K::to(was[v]));
      x[v] = c.softcap > 0 ? c.softcap * std::tanh(static_cast<double>(z) / c.softcap) : z;
      // ties after a float32 tanh are the kernel's, too
      const float rounded = c.softcap > 0 ? c.softcap * tanhf(z * (1.0f / c.softcap)) : z;
      if (rounded > top) top = rounded, argmax = v;
      nan |= std::isnan(x[v]);
      total += x[v];
      max = x[v] > max ? x[v] : max;
    }
    for (double v : x) sum += max == -INFINITY ? 0 : std::exp(v - max);
    const bool known = target >= 0 && target < c.V;
    const double lse = max + std::log(sum), at = known ? x[target] : NAN, exact_nll = lse - at;
    if (nan || !known || !std::isfinite(lse) || !std::isfinite(exact_nll)) {
      ++totals.not_finite;
      if (std::isfinite(nll[p]) || (c.want_loss && std::isfinite(loss[p])))
        complain("a finite loss of a row without one", r, 0, nll[p], exact_nll);
      return;
    }
    check_losses(r, p, exact_nll, lse, max, at, total);
    if (correct[p] != (argmax == target)) complain("correct", r, argmax, correct[p], argmax == target);
    if (c.gradient) check_gradient(r, x, target, weight, lse, exact_nll);
  }

  void check_losses(long r, long p, double exact_nll, double lse, double max, double at, double total) const {
    const double size = std::max(1.0, std::fabs(exact_nll));
    const double rounded = c.softcap > 0 ? std::fabs(max) + std::fabs(at) : 0;
    totals.nll = std::max(totals.nll, std::fabs(nll[p] - exact_nll) / size);
    if (!(std::fabs(nll[p] - exact_nll) <= 3e-6 * size + 2e-7 * rounded)) complain("nll", r, 0, nll[p], exact_nll);
    const double smoothed = c.smoothing ? c.smoothing * at - c.smoothing / c.V * total : 0;
    const double exact = exact_nll + smoothed + c.z_loss * lse * lse;
    if (!c.want_loss || !std::isfinite(exact)) return;
    const double terms = std::max({1.0, std::fabs(exact), c.smoothing * std::fabs(total) / c.V, c.z_loss * lse * lse});
    if (!(std::fabs(loss[p] - exact) <= 1e-5 * terms + 1e-6 * std::fabs(max))) complain("loss", r, 0, loss[p], exact);
  }

  void check_gradient(long r, const std::vector<double>& x, long target, double weight, double lse,
                      double exact_nll) const {
    const T* row = logits + r * stride;
    const double z_slope = 2 * c.z_loss * lse, share = c.smoothing / c.V, size = std::fabs(weight);
    for (long v = 0; v < c.V; ++v) {
      const double p = std::exp(x[v] - lse), ratio = c.softcap > 0 ? x[v] / c.softcap : 0;
      const double slope = 1 - ratio * ratio;
      const double before_cap = v == target ? weight * (std::expm1(-exact_nll) + z_slope * p + c.smoothing - share)
                                            : weight * ((1 + z_slope) * p - share);
      const double exact = before_cap * slope, ours = K::to(row[v]);
      const double allowed = K::eps * std::fabs(exact) * 1.02 + K::tiny + size * (p * 4e-5 + share * 1e-6) +
                             (c.softcap > 0 ? 6e-7 * std::fabs(before_cap) : 0);
      if (!(std::fabs(ours - exact) <= allowed)) complain("dz", r, v, ours, exact);
      if (exact != 0) totals.dz = std::max(totals.dz, std::fabs(ours - exact) / (size + 1e-30));
    }
  }

  const Case c;
  const long stride;
  std::vector<char> storage, before;
  T* logits;
  const long length;
  std::vector<std::int64_t> positions, targets;
  std::vector<float> weights, nll, loss;
  std::vector<std::uint8_t> correct;
};

Case drawn_case(bool large) {
  Case c{};
  emu::limits = {};
  if (large) {
    const long sizes[] = {151936, 151937, 128256, 32000, 262144, 50257, 57344, 57352, 114688, 114689, 400003, 102400};
    c.V = sizes[pick(12)];
  } else {
    c.V = pick(4) == 0 ? 1 + pick(40) : 1 + pick(6000);
    const int multiprocessors[] = {233472, 4096 + 2048, 8192, 6144 + 1600, 12288};
    emu::limits.sm_shared = multiprocessors[pick(5)];
    if (emu::limits.sm_shared < 233472)
      emu::limits.block_shared = 272 + 16 * static_cast<int>(1 + pick(emu::limits.sm_shared / 16 - 20));
  }
  c.rows = large ? 1 : 1 + pick(3);
  c.padding = pick(2) ? 0 : (16 - c.V % 16) % 16;
  c.style = static_cast<int>(pick(6));
  c.weights = pick(2), c.gradient = pick(5) != 0;
  const long terms = pick(3);  // as the Terms of row_math.h
  if (terms > 0) {
    c.z_loss = pick(2) ? 1e-3f : 0.0f;
    c.smoothing = pick(2) ? 0.1f : 0.0f;
  }
  if (terms > 1) {
    c.softcap = static_cast<float>(5 + 20 * uniform());
  }
  c.want_loss = terms > 0 || pick(2);
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const long seed = atol(argv[1]), cases = atol(argv[2]);
  const bool large = std::strcmp(argv[3], "large") == 0;
  emu::mutant = argc > 4 ? atoi(argv[4]) : 0;
  draw.seed(seed), emu::rng.seed(seed + 1);
#if defined(__SSE2__)
  _mm_setcsr(_mm_getcsr() | 0x8040);  // subnormal numbers are zero, as with -ftz=true
#endif
  for (long i = 0; i < cases && !(emu::mutant && totals.mismatches); ++i) {
    Case c = drawn_case(large);
    const long kind = pick(3);
    c.misalign = c.padding ? 0 : pick(kind == 0 ? 4 : 8);
    if (kind == 2 && c.style == 4) c.style = 0;  // beyond the range of float16
    if (kind == 0) Check<float>(c).run();
    if (kind == 1) Check<__nv_bfloat16>(c).run();
    if (kind == 2) Check<__half>(c).run();
  }
  std::printf("seed %ld: %ld cases, %ld rows (%ld unsupervised, %ld not finite), %ld launches, %ld switches, %ld shuffles, "
              "%ld cluster barriers; largest error of nll %.1e, of dz %.1e; %ld mismatches\n",
              seed, cases, totals.rows, totals.dead, totals.not_finite, emu::launches, emu::switches, emu::shuffles,
              emu::cluster_barriers, totals.nll, totals.dz, totals.mismatches);
  return totals.mismatches != 0;
}
