//! Random numbers from a seed, the same on every machine, and the distributions that the workloads need.

/// xoshiro256++ (Blackman and Vigna), seeded by SplitMix64.
#[derive(Debug, Clone)]
pub struct Rng([u64; 4]);

impl Rng {
    /// From a seed.
    pub fn new(seed: u64) -> Rng {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        Rng(std::array::from_fn(|_| next()))
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Above 0, below 1.
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }

    /// Between `low` and `high`.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Below `limit`; 0 for 0. The bias for limits far below 2^64 is of no account here.
    pub fn below(&mut self, limit: usize) -> usize {
        let product = u128::from(self.bits()) * limit as u128;
        (product >> 64) as usize
    }

    /// Into a random order.
    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for last in (1..all.len()).rev() {
            all.swap(last, self.below(last + 1));
        }
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let (radius, angle) = ((-2.0 * self.unit().ln()).sqrt(), std::f64::consts::TAU * self.unit());
        radius * angle.cos()
    }

    /// Exponential with this mean.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * self.unit().ln()
    }

    /// Lognormal with this median; `sigma` is the deviation of the logarithm.
    pub fn lognormal(&mut self, median: f64, sigma: f64) -> f64 {
        median * (sigma * self.normal()).exp()
    }

    /// Pareto with exponent `alpha`, cut to the range from `low` to `high`.
    pub fn pareto(&mut self, alpha: f64, low: f64, high: f64) -> f64 {
        let tail = 1.0 - (low / high).powf(alpha);
        low / (1.0 - self.unit() * tail).powf(1.0 / alpha)
    }

    /// Gamma with shape `alpha` and scale `beta`, mean `alpha * beta` (Marsaglia and Tsang 2000).
    pub fn gamma(&mut self, alpha: f64, beta: f64) -> f64 {
        if alpha < 1.0 {
            let boost = self.unit().powf(1.0 / alpha);
            return self.gamma(alpha + 1.0, beta) * boost;
        }
        let d = alpha - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.unit().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v * beta;
            }
        }
    }
}

/// Logarithm of the gamma function for `x > 0`: Stirling's series beyond 10, the recurrence below.
fn ln_gamma(x: f64) -> f64 {
    if x < 10.0 {
        return ln_gamma(x + 1.0) - x.ln();
    }
    let series = 1.0 / (12.0 * x) - 1.0 / (360.0 * x.powi(3)) + 1.0 / (1260.0 * x.powi(5));
    (x - 0.5) * x.ln() - x + 0.5 * std::f64::consts::TAU.ln() + series
}

/// The share of gamma(`alpha`, `beta`) below `x`: the regularised lower incomplete gamma function by its power series, which
/// converges for every `x`; the workload models ask within a few means, where some hundred terms are enough.
pub fn gamma_cdf(x: f64, alpha: f64, beta: f64) -> f64 {
    let x = x / beta;
    if x <= 0.0 {
        return 0.0;
    }
    let (mut term, mut sum) = (1.0 / alpha, 1.0 / alpha);
    for step in 1..10_000 {
        term *= x / (alpha + f64::from(step));
        sum += term;
        if term < sum * 1e-14 {
            break;
        }
    }
    (sum * (alpha * x.ln() - x - ln_gamma(alpha)).exp()).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(mut draw: impl FnMut() -> f64) -> (f64, f64) {
        let all: Vec<f64> = (0..40_000).map(|_| draw()).collect();
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let variance = all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / all.len() as f64;
        (mean, variance)
    }

    #[test]
    fn distributions_have_their_moments() {
        let mut rng = Rng::new(7);
        let near = |(mean, variance): (f64, f64), want: (f64, f64)| {
            assert!((mean - want.0).abs() < 0.03 * want.0.abs().max(1.0), "mean {mean}, want {}", want.0);
            assert!((variance - want.1).abs() < 0.06 * want.1, "variance {variance}, want {}", want.1);
        };
        near(moments(|| rng.gamma(4.2, 0.94)), (4.2 * 0.94, 4.2 * 0.94 * 0.94));
        near(moments(|| rng.gamma(0.5, 2.0)), (1.0, 2.0));
        near(moments(|| rng.gamma(312.0, 0.03)), (9.36, 312.0 * 0.03 * 0.03));
        near(moments(|| rng.exponential(3.0)), (3.0, 9.0));
        near(moments(|| rng.normal()), (0.0, 1.0));
        near(moments(|| rng.between(0.0, 12.0)), (6.0, 12.0));
        let pareto = moments(|| rng.pareto(1.5, 1.0, 100.0));
        // Mean of the cut distribution: alpha / (alpha - 1) * (1 - high^(1 - alpha)) / (1 - high^-alpha).
        let want = 3.0 * (1.0 - 0.1) / (1.0 - 0.001);
        assert!((pareto.0 - want).abs() < 0.1, "mean {}, want {want}", pareto.0);
    }

    #[test]
    fn gamma_cdf_agrees_with_closed_forms() {
        // Shape 1 is the exponential, shape 2 has a closed form.
        for x in [0.1, 1.0, 5.0, 30.0] {
            assert!((gamma_cdf(x, 1.0, 2.0) - (1.0 - (-x / 2.0f64).exp())).abs() < 1e-9);
            assert!((gamma_cdf(x, 2.0, 1.0) - (1.0 - (1.0 + x) * (-x).exp())).abs() < 1e-9);
        }
        assert_eq!(gamma_cdf(-1.0, 3.0, 1.0), 0.0);
    }

    #[test]
    fn a_seed_is_a_sequence() {
        let draw = |seed| (0..4).map(|_| 0).scan(Rng::new(seed), |rng, _: i32| Some(rng.bits())).collect::<Vec<_>>();
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!((0..1000).all(|seed| Rng::new(seed).below(3) < 3));
    }
}
