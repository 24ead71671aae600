// What select.py reads off whole rows of logits, row by row in two passes, where Torch's operators take about twenty.
//
// Vectors of GCC's and Clang's extension: they become whatever the processor has.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int LANES = 16, GROUP = 64, NODES = 7;
typedef float Floats __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(4), may_alias));

constexpr float INF = std::numeric_limits<float>::infinity();

struct Entry {
    float value;
    int64_t id;
    bool operator<(const Entry& other) const { return value > other.value || (value == other.value && id < other.id); }
};

inline const Floats& at(const float* place) { return *reinterpret_cast<const Floats*>(place); }

inline Floats larger(Floats a, Floats b) { return a < b ? b : a; }

inline float sum(Floats x) {
    float total = 0;
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) x[lane] += x[lane + width];
    return total + x[0];
}

// 2^x for x <= 0, 0 below -126: the Taylor polynomial of degree 7 on [-1/2, 1/2], to about 1e-7 of the value.
inline Floats exp2(Floats x) {
    x = larger(x, Floats{} - 127.0f);
    const Ints whole = __builtin_convertvector(x - 0.5f, Ints);
    const Floats rest = x - __builtin_convertvector(whole, Floats);
    Floats power = rest * 1.5252734e-5f + 1.5403530e-4f;
    power = power * rest + 1.3333558e-3f;
    power = power * rest + 9.6181291e-3f;
    power = power * rest + 5.5504109e-2f;
    power = power * rest + 2.4022651e-1f;
    power = power * rest + 6.9314718e-1f;
    power = power * rest + 1.0f;
    return power * (Floats)((whole + 127) << 23);
}

struct Row {
    std::vector<float> logits;  // -inf beyond the last class, and later on the head
    std::vector<float> peaks;   // of each group, then what is left of them by a selection
    std::vector<float> masses;  // of each group
    std::vector<Entry> found;

    explicit Row(int64_t classes)
        : logits((classes + GROUP - 1) / GROUP * GROUP), peaks(logits.size() / GROUP), masses(peaks.size()) {}

    // Take a row in; whether it holds a NaN.
    bool read(const float* from, int64_t classes) {
        Ints broken{};
        const size_t full = classes / GROUP;
        for (size_t group = 0; group < full; group++) read(group, from + group * GROUP, broken);
        if (full < peaks.size()) {
            float rest[GROUP];
            std::fill(std::copy(from + full * GROUP, from + classes, rest), rest + GROUP, -INF);
            read(full, rest, broken);
        }
        return std::any_of(&broken[0], &broken[0] + LANES, [](int32_t lane) { return lane != 0; });
    }

    void read(size_t group, const float* from, Ints& broken) {
        Floats peak = Floats{} - INF;
        for (int i = 0; i < GROUP; i += LANES) {
            const Floats x = at(from + i);
            *reinterpret_cast<Floats*>(&logits[group * GROUP + i]) = x;
            broken |= x != x;
            peak = larger(peak, x);
        }
        peaks[group] = *std::max_element(&peak[0], &peak[0] + LANES);
    }

    // The `count` largest, sorted: they lie in the groups with the `count` largest peaks.
    void select(int64_t count, int64_t classes) {
        float least = -INF;
        if (count < (int64_t)peaks.size()) {
            std::vector<float>& order = masses;  // not needed yet
            order = peaks;
            std::nth_element(order.begin(), order.begin() + (count - 1), order.end(), std::greater<float>());
            least = order[count - 1];
        }
        found.clear();
        for (size_t group = 0; group < peaks.size(); group++) {
            if (peaks[group] < least) continue;
            const int64_t start = group * GROUP, end = std::min<int64_t>(start + GROUP, classes);
            for (int64_t id = start; id < end; id++)
                if (logits[id] >= least) found.push_back({logits[id], id});
        }
        if ((int64_t)found.size() > count) {
            std::nth_element(found.begin(), found.begin() + count, found.end());
            found.resize(count);
        }
        std::sort(found.begin(), found.end());
    }

    Floats steps(int64_t start, float scale, float peak) const { return (at(&logits[start]) - peak) * scale; }

    // Σ exp(β·(ℓ - peak)) at β = 0.05 times 2, 3, 5, 9, 20, 22 and 40, and Σ exp(ℓ - peak)·(ℓ - peak).
    void reduce(float scale, float peak, float* sums, float* weighted) {
        double all[NODES + 1] = {};
        constexpr size_t STRETCH = 16;  // groups whose sums are single precision
        for (size_t first = 0; first < peaks.size(); first += STRETCH) {
            Floats part[NODES + 1] = {};
            for (size_t group = first; group < std::min(first + STRETCH, peaks.size()); group++) {
                Floats mass{};
                for (int i = 0; i < GROUP; i += LANES) {
                    const Floats x = steps(group * GROUP + i, scale, peak);
                    const Floats u1 = exp2(x), u2 = u1 * u1, u3 = u1 * u2, u4 = u2 * u2, u5 = u2 * u3, u10 = u5 * u5;
                    const Floats u20 = u10 * u10;
                    part[0] += u2;
                    part[1] += u3;
                    part[2] += u5;
                    part[3] += u5 * u4;
                    mass += u20;
                    part[5] += u20 * u2;
                    part[6] += u20 * u20;
                    part[7] += u20 * larger(x, Floats{} - 1e30f);  // never 0·(-inf)
                }
                part[4] += mass;
                masses[group] = sum(mass);
            }
            for (int node = 0; node <= NODES; node++) all[node] += sum(part[node]);
        }
        for (int node = 0; node < NODES; node++) sums[node] = (float)all[node];
        *weighted = (float)(all[NODES] / scale);
    }

    // Systematic sampling by the masses that `reduce` has left: see `_draw`.
    void draw(float scale, float peak, double uniform, int64_t draws, int64_t classes, int64_t* ids) const {
        double total = 0;
        for (float mass : masses) total += mass;
        double before = 0;
        size_t group = 0;
        for (int64_t tooth = 0; tooth < draws; tooth++) {
            const double target = (uniform + (double)tooth) / (double)draws * total;
            while (group + 1 < masses.size() && before + masses[group] <= target) before += masses[group++];
            alignas(64) float reached[GROUP];
            for (int i = 0; i < GROUP; i += LANES) {
                const Floats u1 = exp2(steps(group * GROUP + i, scale, peak)), u5 = u1 * u1 * u1 * u1 * u1;
                *reinterpret_cast<Floats*>(reached + i) = (u5 * u5) * (u5 * u5);
            }
            for (int i = 1; i < GROUP; i++) reached[i] += reached[i - 1];
            // The sums of a group and of all groups are not rounded alike: no target may lie beyond its group's end.
            const float wanted = std::min((float)(target - before), reached[GROUP - 1] * (1 - 1e-6f));
            const int64_t place = std::upper_bound(reached, reached + GROUP, wanted) - reached;
            ids[tooth] = std::min<int64_t>(group * GROUP + place, classes - 1);
        }
    }

    // Classes likelier than one with this logit.
    int64_t rank(float than) const {
        int64_t count = 0;
        for (size_t start = 0; start < logits.size(); start += GROUP) {
            Ints more{};
            for (int i = 0; i < GROUP; i += LANES) more -= at(&logits[start + i]) > than;
            for (int lane = 0; lane < LANES; lane++) count += more[lane];
        }
        return count;
    }
};

}  // namespace

// Shapes: logits [rows, classes]; gold [rows], the right class's logit; uniforms [rows], unused without
// draws; top, ids [rows, head + 1]; sums [rows, 7]; weighted, ranks [rows]; drawn [rows, draws]. `scale` is that of a
// logit in steps of 0.05 as powers of 2, `lowest` the peak of a tail without any.
extern "C" void distill_select(const float* logits, int64_t rows, int64_t classes, int64_t head, int64_t draws,
                               float scale, float lowest, const float* gold, const double* uniforms, float* top,
                               int64_t* ids, float* sums, float* weighted, int64_t* drawn, int64_t* ranks) {
    Row row(classes);
    const int64_t count = std::min(head + 1, classes);
    for (int64_t n = 0; n < rows; n++) {
        float* values = top + n * (head + 1);
        std::fill(values, values + head + 1, -INF);
        if (row.read(logits + n * classes, classes)) {
            values[0] = std::numeric_limits<float>::quiet_NaN();
            continue;
        }
        row.select(count, classes);
        for (int64_t i = 0; i < count; i++) {
            values[i] = row.found[i].value;
            ids[n * (head + 1) + i] = row.found[i].id;
        }
        // Where the right class is in the head, the rest of the row needs no look.
        ranks[n] = gold[n] < values[head] ? row.rank(gold[n])
                                          : std::count_if(values, values + head, [&](float v) { return v > gold[n]; });
        for (int64_t i = 0; i < std::min(head, count); i++) row.logits[row.found[i].id] = -INF;
        const float peak = std::max(values[head], lowest);
        row.reduce(scale, peak, sums + n * NODES, weighted + n);
        if (draws) row.draw(scale, peak, uniforms[n], draws, classes, drawn + n * draws);
    }
}
