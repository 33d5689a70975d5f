//! Which images go when the disk fills: pure. The kubelet's rules: from the high threshold on, the longest unused first, down to the
//! low threshold; nothing that a pod uses, and nothing that was used or came a moment ago.

use super::Digest;

/// What is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// From this share of the disk on images are removed, percent; 100: never.
    pub high_percent: u64,
    /// Down to this share.
    pub low_percent: u64,
    /// An image that was used within this time stays.
    pub min_age_ms: u64,
    /// An image that was not used for this long goes however much room there is; 0: it does not.
    pub max_age_ms: u64,
}

/// An image, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub id: Digest,
    /// What its layers take; some of it may be shared.
    pub bytes: u64,
    /// When a pod last used it or it came.
    pub last_used_ms: u64,
    /// A pod uses it now.
    pub in_use: bool,
    /// It has a name.
    pub named: bool,
}

/// The images to remove, in this order. `disk` is all of it and what is free, bytes; `pressed`: as much as can be had.
#[must_use]
pub fn plan(rules: &Rules, (total, free): (u64, u64), images: &[Candidate], now_ms: u64, pressed: bool) -> Vec<Digest> {
    let mut unused: Vec<&Candidate> = images.iter().filter(|image| !image.in_use).collect();
    unused.sort_by_key(|image| (image.last_used_ms, &image.id));
    let idle_ms = |image: &Candidate| now_ms.saturating_sub(image.last_used_ms);
    let mut left = to_free(rules, total, free, pressed);
    let mut gone = Vec::new();
    for image in unused {
        let too_old = rules.max_age_ms > 0 && idle_ms(image) > rules.max_age_ms;
        if too_old || (left > 0 && idle_ms(image) >= rules.min_age_ms) {
            left = left.saturating_sub(image.bytes);
            gone.push(image.id.clone());
        }
    }
    gone
}

/// What a user asks to remove: unused images without a name, with `all` those with one too.
#[must_use]
pub fn prune(images: &[Candidate], all: bool) -> Vec<Digest> {
    images.iter().filter(|image| !image.in_use && (all || !image.named)).map(|image| image.id.clone()).collect()
}

fn to_free(rules: &Rules, total: u64, free: u64, pressed: bool) -> u64 {
    if pressed {
        return u64::MAX;
    }
    let share = |percent: u64| u128::from(total) * u128::from(percent.min(100)) / 100;
    let used = u128::from(total.saturating_sub(free));
    if total == 0 || rules.high_percent >= 100 || used < share(rules.high_percent) {
        return 0;
    }
    u64::try_from(used.saturating_sub(share(rules.low_percent))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(number: u8, bytes: u64, last_used_ms: u64, in_use: bool) -> Candidate {
        Candidate { id: Digest::from_hash(&[number; 32]), bytes, last_used_ms, in_use, named: true }
    }

    #[test]
    fn the_longest_unused_go_until_there_is_room() {
        let rules = Rules { high_percent: 85, low_percent: 80, min_age_ms: 100, max_age_ms: 0 };
        let images = [
            image(1, 10, 500, false),
            image(2, 40, 300, false),
            image(3, 40, 400, false),
            image(4, 900, 1, true),
            image(5, 90, 950, false),
        ];
        // Of 1000: what is free, whether the node is pressed → who goes.
        for (free, pressed, want) in [
            (151, false, &[][..]),
            // 150 free is 85 % used: 50 more to 80 %.
            (150, false, &[2, 3]),
            (165, true, &[2, 3, 1]),
            (160, false, &[]),
            (100, false, &[2, 3, 1]),
            (0, false, &[2, 3, 1]),
        ] {
            let gone: Vec<Digest> = want.iter().map(|number| Digest::from_hash(&[*number; 32])).collect();
            assert_eq!(plan(&rules, (1000, free), &images, 1000, pressed), gone, "{free} free");
        }
        let never = Rules { high_percent: 100, ..rules };
        assert!(plan(&never, (1000, 0), &images, 1000, false).is_empty());
        assert!(plan(&rules, (0, 0), &images, 1000, false).is_empty(), "a disk that cannot be measured is not full");
    }

    #[test]
    fn what_was_not_used_for_long_goes_without_need() {
        let rules = Rules { high_percent: 85, low_percent: 80, min_age_ms: 100, max_age_ms: 500 };
        let images = [image(1, 10, 500, false), image(2, 10, 499, false), image(3, 10, 1, true)];
        assert_eq!(plan(&rules, (1000, 900), &images, 1000, false), [Digest::from_hash(&[2; 32])]);
    }
}
