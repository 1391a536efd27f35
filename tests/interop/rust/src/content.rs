//! The content that streams carry: pseudo-random bytes with a prime period, so that lost, repeated or swapped blocks
//! change the hash. Every implementation in this directory makes the same.

use std::sync::LazyLock;

const PERIOD: usize = 524_287;
const BLOCK: usize = 64 * 1024;

static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut content = Vec::with_capacity(PERIOD + BLOCK);
    let mut state: u32 = 2_463_534_242;
    for _ in 0..PERIOD {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        content.push((state >> 24) as u8);
    }
    content.extend_from_within(..BLOCK);
    content
});

/// `size` bytes of the content with this seed, in blocks of at most 64 KiB.
pub fn blocks(size: usize, seed: usize) -> impl Iterator<Item = &'static [u8]> {
    let start = (seed * 7919) % PERIOD;
    (0..size).step_by(BLOCK).map(move |at| {
        let from = (start + at) % PERIOD;
        &PATTERN[from..from + BLOCK.min(size - at)]
    })
}
