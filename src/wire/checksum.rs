//! The Internet checksum: RFC 1071, and RFC 1624 for a header of which one field changed.

/// Checksum over `data`: the complement of the one's complement sum of its 16-bit words, an odd last byte being padded
/// with a zero on its right. Data whose checksum field is filled in and right give 0.
///
/// `data` is one packet: at most 65,535 bytes, which a 32-bit accumulator holds without overflow.
pub fn of(data: &[u8]) -> u16 {
    let (words, rest) = data.as_chunks::<2>();
    let last = rest.first().map_or(0, |byte| u32::from(*byte) << 8);
    let sum =
        words.iter().fold(last, |sum, word| sum.wrapping_add(u32::from(u16::from_be_bytes(*word))));
    !fold(sum)
}

/// The checksum after one 16-bit word of the data changed from `old` to `new` (RFC 1624, equation 3).
pub fn update(checksum: u16, old: u16, new: u16) -> u16 {
    !fold(u32::from(!checksum) + u32::from(!old) + u32::from(new))
}

/// Adds the carries back in.
fn fold(sum: u32) -> u16 {
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
