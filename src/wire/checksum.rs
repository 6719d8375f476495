//! The Internet checksum: RFC 1071, and RFC 1624 for a header of which one field changed.
//!
//! Sums are one's complement sums of big-endian 16-bit words, folded to 16 bits. They may be added in any order, and
//! data may be summed in any byte order if the sum is swapped at the end (RFC 1071, 2); so [`sum`] reads 32-bit words in
//! the machine's own order into lanes of 64 bits, which the compiler turns into vector additions on every architecture
//! (`cargo bench --bench forward` measures it).

use crate::sys::vector::widest;

/// Words that are summed side by side: enough for two vector registers of 256 bits.
const LANES: usize = 8;
/// Blocks from which on it pays to ask for wider vectors.
const WORTH_IT: usize = 4;

/// One's complement sum over `data`, an odd last byte being padded with a zero on its right.
///
/// `data` is less than 4 GiB long, which a 64-bit accumulator holds without overflow.
pub fn sum(data: &[u8]) -> u16 {
    let (blocks, rest) = data.as_chunks::<{ 4 * LANES }>();
    let mut total =
        if blocks.len() < WORTH_IT { add_lanes(blocks) } else { widest(|| add_lanes(blocks)) };
    let (words, rest) = rest.as_chunks::<4>();
    total += words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum::<u64>();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_ne_bytes(last));
    // 2^16, 2^32 and 2^48 are 1 in one's complement arithmetic, whatever the byte order
    let half = (total & 0xffff_ffff) + (total >> 32);
    let half = (half & 0xffff_ffff) + (half >> 32);
    let folded = (half & 0xffff) + (half >> 16);
    #[allow(clippy::cast_possible_truncation)] // at most 0x1fffe
    let folded = fold(folded as u32);
    u16::from_be(folded)
}

#[inline(always)] // to be compiled for wide vectors as well
fn add_lanes(blocks: &[[u8; 4 * LANES]]) -> u64 {
    let mut lanes = [0u64; LANES];
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    lanes.iter().sum()
}

/// The sum of two sums.
#[inline]
pub fn add(a: u16, b: u16) -> u16 {
    fold(u32::from(a) + u32::from(b))
}

/// Checksum over `data`: the complement of its sum. Data whose checksum field is filled in and right give 0.
pub fn of(data: &[u8]) -> u16 {
    !sum(data)
}

/// The checksum after one 16-bit word of the data changed from `old` to `new` (RFC 1624, equation 3).
pub fn update(checksum: u16, old: u16, new: u16) -> u16 {
    !fold(u32::from(!checksum) + u32::from(!old) + u32::from(new))
}

/// Adds the carries back in.
#[inline]
pub fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    let twice = (once & 0xffff) + (once >> 16);
    #[allow(clippy::cast_possible_truncation)] // the second fold leaves no carry
    {
        twice as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_1071_example() {
        // section 3: the sum of these bytes is ddf2
        assert_eq!(of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    #[test]
    fn odd_length_is_padded_and_empty_is_all_ones() {
        assert_eq!(of(&[0x12, 0x34, 0x56]), of(&[0x12, 0x34, 0x56, 0x00]));
        assert_eq!(of(&[]), 0xffff);
    }

    #[test]
    fn longest_packet_of_ones_does_not_overflow() {
        assert_eq!(of(&[0xff; 65_534]), 0);
    }

    /// Against one word after the other, at every length and alignment around the lanes.
    #[test]
    fn sum_equals_the_obvious_one() {
        let data: Vec<u8> = (0..300u32).map(|i| (i * i * 7 + 13).to_le_bytes()[0]).collect();
        for from in 0..9 {
            for to in from..data.len() {
                let data = &data[from..to];
                let obvious = data.chunks(2).fold(0u32, |sum, pair| {
                    sum + u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]))
                });
                assert_eq!(sum(data), fold(obvious), "{from}..{to}");
            }
        }
    }

    #[test]
    fn parts_add_up() {
        let data: Vec<u8> = (0..200).collect();
        for at in (0..200).step_by(2) {
            assert_eq!(add(sum(&data[..at]), sum(&data[at..])), sum(&data));
        }
    }

    #[test]
    fn update_equals_a_fresh_checksum() {
        let mut seed = 0x2545_f491_u32;
        for _ in 0..2000 {
            let mut data = [0u8; 20];
            for byte in &mut data {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = seed.to_be_bytes()[0];
            }
            let (before, old) = (of(&data), u16::from_be_bytes([data[8], data[9]]));
            data[8] = data[8].wrapping_sub(1);
            let new = u16::from_be_bytes([data[8], data[9]]);
            assert_eq!(update(before, old, new), of(&data));
        }
    }
}
