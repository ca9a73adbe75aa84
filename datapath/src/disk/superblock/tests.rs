//! The superblock's block: what it holds, damaged and arbitrary ones, where it stands, and the lineage it keeps.

use super::*;
use proptest::prelude::*;

/// Any: the block is the same in each.
const FORMAT: u32 = 2;

fn any_superblock() -> impl Strategy<Value = Superblock> {
    let states = prop_oneof![
        Just(DiskState::UpToDate),
        Just(DiskState::Inconsistent),
        Just(DiskState::Outdated),
        Just(DiskState::Failed)
    ];
    let numbers =
        (any::<[u8; 16]>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<[u64; 8]>());
    ("[a-zé]{1,60}", "[a-z]{1,255}", numbers, states, any::<[bool; 5]>()).prop_map(
        |(volume, node, (volume_id, size, epoch, current, base, history), disk_state, bits)| Superblock {
            volume_id,
            volume,
            node,
            size,
            epoch: Epoch(epoch),
            generations: Generations {
                current: Generation(current),
                base: Generation(base),
                history: history.map(Generation),
            },
            disk_state,
            zeroed: bits[0],
            primary: bits[1],
            clean: bits[2],
            applying: bits[3],
            peer_has_current: bits[4],
            copying: Generation::ZERO,
            sessions_offered: 0,
            sessions_begun: 0,
            boot: [0; 16],
        },
    )
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(superblock in any_superblock(), sequence in any::<u64>()) {
        prop_assert_eq!(Superblock::decode_as(FORMAT, &superblock.encode_as(FORMAT, sequence, &[])), Ok((superblock, sequence)));
    }

    #[test]
    fn any_flipped_bit_is_refused(superblock in any_superblock(), bit in 0..SUPERBLOCK_LEN * 8) {
        let mut bytes = superblock.encode_as(FORMAT, 7, &[]);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Superblock::decode_as(FORMAT, &bytes).is_err());
    }

    #[test]
    fn arbitrary_fields_never_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), SUPERBLOCK_LEN),
        version in any::<bool>(),
    ) {
        bytes[..8].copy_from_slice(&MAGIC);
        if version {
            bytes[8..16].copy_from_slice(&[2, 0, 0, 0, 3, 0, 0, 0]);
        }
        let crc = crc32c::crc32c(&bytes[..CHECKED_LEN]);
        bytes[CHECKED_LEN..].copy_from_slice(&crc.to_le_bytes());
        let _ = Superblock::decode_as(FORMAT, &bytes);
    }
}

#[test]
fn a_device_keeps_its_metadata_in_its_last_mebibyte() {
    let at = |len| Location::at_end_of(Path::new("/dev/x"), len).map(|location| location.offset);
    assert_eq!(at((5 << 20) + 512), Some(4 << 20));
    assert_eq!(at(1000), None);
}

#[test]
fn a_new_generation_remembers_what_the_peer_has() {
    let mut generations = Generations::default();
    generations.advance(Generation(1), true);
    assert_eq!(generations, Generations { current: Generation(1), ..Default::default() });
    generations.advance(Generation(2), true);
    generations.advance(Generation(3), false);
    assert_eq!((generations.current, generations.base), (Generation(3), Generation(1)));
    assert_eq!(generations.history[..3], [Generation(2), Generation(1), Generation::ZERO]);
    for next in 4..30 {
        generations.advance(Generation(next), false);
    }
    assert_eq!(generations.history[7], Generation(21));
    assert!(generations.descends_from(Generation(1)) && generations.descends_from(Generation(28)));
    assert!(!generations.descends_from(Generation(29)) && !generations.descends_from(Generation::ZERO));
}
