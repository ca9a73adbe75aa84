//! The whole decision table, each row in both directions, and properties over arbitrary pairs of disks.

use super::*;
use costandby_datapath::limits::GENERATION_HISTORY_LEN;
use proptest::prelude::*;

const FULL_MINE: fn(Why) -> Verdict = |why| Verdict::Resync { source: Side::Mine, why, scope: Scope::Full };
const FULL_THEIRS: fn(Why) -> Verdict =
    |why| Verdict::Resync { source: Side::Theirs, why, scope: Scope::Full };
const DELTA_MINE: fn(Why) -> Verdict = |why| Verdict::Resync { source: Side::Mine, why, scope: Scope::Delta };
const DELTA_THEIRS: fn(Why) -> Verdict =
    |why| Verdict::Resync { source: Side::Theirs, why, scope: Scope::Delta };

fn fresh() -> View {
    View {
        volume_id: [0; 16],
        size: 1 << 20,
        epoch: Epoch::ZERO,
        generations: Generations::default(),
        disk_state: DiskState::UpToDate,
        zeroed: false,
        was_primary: false,
        was_primary_unclean: false,
        applying_unclean: false,
        lost_power: false,
        dirty: false,
        copying: Generation::ZERO,
        sessions_offered: 0,
        sessions_begun: 0,
        role: ServingRole::Standby,
        configured_primary: false,
        proposed: Lineage { volume_id: [9; 16], generation: 99 },
        recall: None,
    }
}

fn disk(current: u64, base: u64, history: &[u64]) -> View {
    let mut generations =
        Generations { current: Generation(current), base: Generation(base), ..Generations::default() };
    for (to, from) in generations.history.iter_mut().zip(history) {
        *to = Generation(*from);
    }
    View { volume_id: [7; 16], generations, ..fresh() }
}

fn bad(disk_state: DiskState, view: View) -> View {
    View { disk_state, ..view }
}

fn configured(view: View) -> View {
    View { configured_primary: true, ..view }
}

fn crashed(view: View) -> View {
    View { was_primary: true, was_primary_unclean: true, ..view }
}

fn torn(view: View) -> View {
    View { applying_unclean: true, ..view }
}

fn serving(view: View) -> View {
    View { role: ServingRole::Primary, ..view }
}

fn check(mine: &View, theirs: &View, expected: Verdict) {
    assert_eq!(compare(mine, theirs), expected, "\nmine   {mine:?}\ntheirs {theirs:?}");
    assert_eq!(compare(theirs, mine), expected.mirrored(), "mirrored\nmine   {mine:?}\ntheirs {theirs:?}");
}

#[test]
fn fresh_disks() {
    let zeroed = |view: View| View { zeroed: true, ..view };
    let first = configured(View { proposed: Lineage { volume_id: [1; 16], generation: 11 }, ..fresh() });
    check(&zeroed(first), &zeroed(fresh()), Verdict::InSync { adopt: Some(first.proposed) });
    check(&first, &zeroed(fresh()), FULL_MINE(Why::BothFresh));
    check(&zeroed(first), &fresh(), FULL_THEIRS(Why::BothFresh));
    check(&zeroed(fresh()), &fresh(), FULL_THEIRS(Why::BothFresh));
    check(&first, &fresh(), Verdict::TwoWithData);
    check(&fresh(), &fresh(), Verdict::TwoWithData);
    check(&zeroed(fresh()), &zeroed(fresh()), Verdict::NoUsableDisk);
    check(&zeroed(first), &zeroed(first), Verdict::NoUsableDisk);
    check(&bad(DiskState::Inconsistent, first), &fresh(), FULL_THEIRS(Why::BothFresh));
    check(&bad(DiskState::Inconsistent, first), &zeroed(fresh()), FULL_THEIRS(Why::BothFresh));
    check(&bad(DiskState::Inconsistent, first), &bad(DiskState::Failed, fresh()), Verdict::NoUsableDisk);
    check(&first, &bad(DiskState::Inconsistent, fresh()), FULL_MINE(Why::BothFresh));
    check(&first, &bad(DiskState::Failed, zeroed(fresh())), FULL_MINE(Why::BothFresh));
    check(&zeroed(fresh()), &bad(DiskState::Failed, zeroed(first)), FULL_MINE(Why::BothFresh));
    check(&first, &disk(5, 0, &[]), FULL_THEIRS(Why::TargetFresh));
    check(&first, &bad(DiskState::Failed, disk(5, 0, &[])), Verdict::NoUsableDisk);
    check(&first, &torn(disk(5, 0, &[])), Verdict::NoUsableDisk);
    let met = View { volume_id: [3; 16], ..fresh() };
    check(&met, &disk(5, 0, &[]), Verdict::Unrelated);
}

#[test]
fn a_new_disk_that_failed_and_may_hold_data_is_given_up_only_at_an_operators_word() {
    let zeroed = |view: View| View { zeroed: true, ..view };
    let failed = bad(DiskState::Failed, fresh());
    assert_eq!(failed.disk_state_shown(), "new and failed");
    for failed in [failed, configured(failed)] {
        let others = [
            fresh(),
            zeroed(fresh()),
            bad(DiskState::Inconsistent, fresh()),
            bad(DiskState::Failed, fresh()),
        ];
        for other in others.into_iter().flat_map(|other| [other, configured(other)]) {
            check(&failed, &other, Verdict::NoUsableDisk);
            assert_eq!(agree(&failed, &other).primary, None);
        }
        assert!(failed.is_lost_while_new() && !fresh().is_lost_while_new());
    }
    // An operator chose the other one, by `promote --force` there.
    check(&failed, &disk(5, 0, &[]), FULL_THEIRS(Why::TargetFresh));
    // It failed in the middle of being copied to, and that volume was begun anew: nothing of its own is left on it.
    let half = View { copying: COPYING_WHOLE, ..failed };
    check(&configured(zeroed(fresh())), &half, FULL_MINE(Why::BothFresh));
    assert!(!half.is_lost_while_new());
}

#[test]
fn strangers() {
    check(&disk(5, 0, &[]), &View { size: 1 << 21, ..disk(5, 0, &[]) }, Verdict::SizeDiffers);
    check(&disk(5, 0, &[]), &View { volume_id: [8; 16], ..disk(5, 0, &[]) }, Verdict::Unrelated);
    check(&disk(5, 0, &[]), &View { volume_id: [0; 16], ..disk(5, 0, &[]) }, Verdict::Unrelated);
    check(&disk(5, 0, &[1]), &disk(6, 0, &[2]), Verdict::Unrelated);
}

#[test]
fn equal_generations_and_who_stopped_how() {
    let same = || disk(5, 4, &[4, 3]);
    check(&same(), &same(), Verdict::InSync { adopt: None });
    check(&serving(same()), &same(), Verdict::InSync { adopt: None });
    check(&crashed(same()), &same(), DELTA_MINE(Why::SourceHasInFlight));
    check(&crashed(same()), &serving(same()), DELTA_THEIRS(Why::TargetMayBeTorn));
    check(&crashed(serving(same())), &same(), DELTA_MINE(Why::SourceHasInFlight));
    check(&torn(same()), &same(), DELTA_THEIRS(Why::TargetMayBeTorn));
    check(&torn(same()), &crashed(same()), DELTA_THEIRS(Why::TargetMayBeTorn));
    check(&crashed(same()), &crashed(same()), Verdict::SplitBrain);
    check(&serving(same()), &serving(same()), Verdict::SplitBrain);
    check(&torn(configured(same())), &torn(same()), DELTA_MINE(Why::TargetMayBeTorn));
    check(&torn(configured(same())), &torn(disk(6, 5, &[5])), Verdict::NoUsableDisk);
    check(&torn(configured(same())), &torn(crashed(same())), Verdict::NoUsableDisk);
}

#[test]
fn one_disk_is_not_up_to_date() {
    for state in [DiskState::Inconsistent, DiskState::Outdated, DiskState::Failed] {
        let why = Why::TargetNotUpToDate;
        // What a failing medium lost stands in no map.
        let near = if state == DiskState::Failed { FULL_MINE(why) } else { DELTA_MINE(why) };
        check(&disk(5, 0, &[]), &bad(state, disk(5, 0, &[])), near);
        check(&disk(6, 5, &[5]), &bad(state, disk(5, 0, &[])), near);
        check(&disk(7, 6, &[6, 5]), &bad(state, disk(5, 0, &[])), FULL_MINE(why));
        check(
            &bad(state, disk(5, 0, &[])),
            &bad(DiskState::Inconsistent, disk(5, 0, &[])),
            Verdict::NoUsableDisk,
        );
    }
    check(
        &disk(5, 0, &[]),
        &bad(DiskState::Inconsistent, disk(6, 5, &[5])),
        FULL_MINE(Why::TargetNotUpToDate),
    );
    check(&disk(5, 0, &[]), &bad(DiskState::Outdated, disk(6, 5, &[5])), Verdict::NoUsableDisk);
    check(&disk(5, 0, &[]), &torn(disk(6, 5, &[5])), Verdict::NoUsableDisk);
    check(&disk(6, 5, &[5]), &torn(disk(5, 0, &[])), DELTA_MINE(Why::TargetMayBeTorn));
    check(&disk(6, 4, &[4]), &bad(DiskState::Failed, disk(7, 4, &[4])), Verdict::SplitBrain);
    check(&disk(6, 0, &[]), &bad(DiskState::Failed, disk(7, 0, &[])), Verdict::Unrelated);
}

#[test]
fn one_went_on_or_both_did() {
    check(&disk(6, 5, &[5]), &disk(5, 0, &[]), DELTA_MINE(Why::TargetBehind));
    check(&disk(8, 5, &[7, 6]), &disk(5, 0, &[]), DELTA_MINE(Why::TargetBehind));
    check(&disk(8, 0, &[7, 6, 5]), &crashed(disk(5, 0, &[])), FULL_MINE(Why::TargetBehind));
    check(&disk(6, 5, &[5]), &disk(7, 5, &[5]), Verdict::SplitBrain);
    check(&disk(6, 0, &[4]), &disk(7, 4, &[]), Verdict::SplitBrain);
    check(&disk(6, 5, &[]), &disk(5, 6, &[]), Verdict::SplitBrain);
}

#[test]
fn who_serves_after_the_handshake() {
    let check = |mine: &View, theirs: &View, primary: Option<Side>, epoch: u64| {
        let agreement = agree(mine, theirs);
        assert_eq!((agreement.primary, agreement.epoch), (primary, epoch), "{mine:?}\n{theirs:?}");
        assert_eq!(agree(theirs, mine), agreement.mirrored());
    };
    let was = |view: View| View { was_primary: true, ..view };
    let at = |epoch: u64, view: View| View { epoch: Epoch(epoch), ..view };
    let (old, new) = (|| disk(5, 0, &[]), || disk(6, 5, &[5]));
    check(&configured(fresh()), &fresh(), None, 0);
    check(&configured(fresh()), &View { zeroed: true, ..fresh() }, Some(Side::Mine), 1);
    let zeroed = |view: View| View { zeroed: true, ..view };
    check(&zeroed(configured(fresh())), &zeroed(fresh()), Some(Side::Mine), 1);
    check(&zeroed(configured(fresh())), &fresh(), Some(Side::Theirs), 1);
    check(&configured(old()), &at(3, old()), None, 3);
    check(&was(old()), &configured(old()), Some(Side::Mine), 0);
    check(&was(old()), &configured(was(old())), Some(Side::Theirs), 0);
    check(&was(old()), &new(), None, 0);
    check(&was(old()), &was(new()), Some(Side::Theirs), 0);
    check(&was(old()), &serving(old()), Some(Side::Theirs), 0);
    check(&serving(old()), &serving(new()), Some(Side::Theirs), 0);
    check(&serving(old()), &was(new()), Some(Side::Theirs), 0);
    check(&at(2, serving(old())), &at(1, fresh()), Some(Side::Mine), 2);
    check(&serving(disk(7, 5, &[5])), &new(), None, 0);
}

/// In the middle of being overwritten with `copying`.
fn mixture(copying: u64, view: View) -> View {
    View { copying: Generation(copying), ..bad(DiskState::Inconsistent, view) }
}

fn dirty(view: View) -> View {
    View { dirty: true, ..view }
}

fn dark(view: View) -> View {
    View { lost_power: true, ..crashed(view) }
}

#[test]
fn an_interrupted_copy_goes_on_where_it_was_the_same_lineage() {
    let why = Why::TargetNotUpToDate;
    let whole = COPYING_WHOLE.0;
    check(&disk(6, 0, &[]), &mixture(6, disk(3, 0, &[])), DELTA_MINE(why));
    check(&disk(8, 7, &[7, 6]), &mixture(6, disk(3, 0, &[])), DELTA_MINE(why));
    check(&disk(8, 6, &[7]), &mixture(6, disk(3, 0, &[])), DELTA_MINE(why));
    check(&disk(8, 0, &[7]), &mixture(6, disk(3, 0, &[])), FULL_MINE(why));
    // Its own generation says nothing any more once another's bytes are among it.
    check(&disk(8, 3, &[3]), &mixture(6, disk(3, 0, &[])), FULL_MINE(why));
    check(&disk(8, 3, &[3]), &mixture(whole, disk(3, 0, &[])), FULL_MINE(why));
    check(&disk(8, 3, &[3]), &mixture(0, disk(3, 0, &[])), DELTA_MINE(why));
    check(&disk(whole, 3, &[3]), &mixture(whole, disk(3, 0, &[])), FULL_MINE(why));
    // A new disk that was already being copied to.
    check(&disk(6, 0, &[]), &mixture(6, fresh()), DELTA_MINE(Why::TargetFresh));
    check(&disk(6, 0, &[]), &mixture(whole, fresh()), FULL_MINE(Why::TargetFresh));
}

#[test]
fn a_side_given_up_in_a_split_brain_gives_up_what_either_did_since() {
    let why = Why::TargetNotUpToDate;
    check(&disk(6, 5, &[5]), &mixture(0, disk(7, 5, &[5])), DELTA_MINE(why));
    check(&disk(6, 5, &[5]), &mixture(0, disk(7, 4, &[4])), FULL_MINE(why));
    check(&disk(6, 0, &[5]), &mixture(0, disk(7, 0, &[5])), FULL_MINE(why));
    check(&disk(6, 5, &[5]), &bad(DiskState::Outdated, disk(7, 5, &[5])), Verdict::SplitBrain);
}

#[test]
fn after_a_loss_of_power_the_node_that_kept_it_is_the_source() {
    let same = || disk(5, 4, &[4, 3]);
    check(&dark(same()), &same(), DELTA_THEIRS(Why::TargetLostPower));
    check(&dark(dirty(same())), &dirty(same()), DELTA_THEIRS(Why::TargetLostPower));
    check(&dark(same()), &serving(same()), DELTA_THEIRS(Why::TargetMayBeTorn));
    check(&dark(same()), &torn(same()), DELTA_MINE(Why::TargetMayBeTorn));
    check(&dark(same()), &View { lost_power: true, ..same() }, DELTA_MINE(Why::SourceHasInFlight));
    check(&dark(same()), &bad(DiskState::Inconsistent, same()), DELTA_MINE(Why::TargetNotUpToDate));
    check(&dark(same()), &crashed(same()), Verdict::SplitBrain);
    check(&dark(disk(6, 5, &[5])), &disk(5, 0, &[]), DELTA_MINE(Why::TargetBehind));
    check(&dark(disk(5, 0, &[])), &disk(6, 5, &[5]), DELTA_THEIRS(Why::TargetBehind));
    let agreement = agree(&dark(same()), &same());
    assert_eq!(agreement.primary, None, "it resumes once it has what it lacks");
}

#[test]
fn equal_disks_with_parts_on_record_are_compared_by_a_copy_of_those() {
    let same = || disk(5, 4, &[4, 3]);
    let why = Why::PartsMayDiffer;
    let was = |view: View| View { was_primary: true, ..view };
    for (mine, theirs) in [(dirty(same()), same()), (same(), dirty(same())), (dirty(same()), dirty(same()))] {
        check(&configured(mine), &was(theirs), DELTA_THEIRS(why));
        check(&configured(was(mine)), &serving(theirs), DELTA_THEIRS(why));
    }
    // Nobody serves or did: the bytes of the one that knows where they differ.
    check(&dirty(same()), &configured(same()), DELTA_MINE(why));
    check(&dirty(same()), &same(), DELTA_MINE(why));
    check(&configured(dirty(same())), &dirty(same()), DELTA_MINE(why));
    check(&dirty(same()), &dirty(same()), Verdict::NoUsableDisk);
    check(&crashed(same()), &dirty(same()), DELTA_MINE(Why::SourceHasInFlight));
    let zeroed = |view: View| View { zeroed: true, ..view };
    check(&configured(zeroed(fresh())), &zeroed(dirty(fresh())), FULL_MINE(Why::BothFresh));
}

#[test]
fn a_disk_of_an_earlier_time_is_copied_to_and_never_copied_from() {
    let at =
        |sessions: u64, view: View| View { sessions_offered: sessions, sessions_begun: sessions, ..view };
    let same = || disk(5, 4, &[4]);
    let why = Why::TargetRolledBack;
    check(&at(7, same()), &at(7, same()), Verdict::InSync { adopt: None });
    check(&at(7, same()), &at(6, same()), FULL_MINE(why));
    check(&at(7, same()), &at(6, crashed(same())), FULL_MINE(why));
    check(&at(7, serving(same())), &at(6, dirty(same())), FULL_MINE(why));
    check(&at(7, disk(6, 5, &[5])), &at(6, same()), FULL_MINE(why));
    check(&at(7, torn(same())), &at(6, same()), Verdict::NoUsableDisk);
    // It was ready for the session, which began at the other alone.
    let ready = View { sessions_offered: 7, sessions_begun: 6, ..same() };
    check(&at(7, same()), &ready, Verdict::InSync { adopt: None });
    // It went on from there.
    check(&at(7, same()), &at(6, disk(6, 5, &[5])), Verdict::SplitBrain);
    check(&at(7, same()), &at(6, serving(same())), Verdict::SplitBrain);
    // What it would be copied from is given up.
    let given_up = bad(DiskState::Inconsistent, same());
    check(&at(7, given_up), &at(6, same()), FULL_THEIRS(Why::TargetNotUpToDate));
    check(&at(7, same()), &at(6, given_up), FULL_MINE(why));
}

fn any_view() -> impl Strategy<Value = View> {
    let small = || 0u64..5;
    let states = prop_oneof![
        3 => Just(DiskState::UpToDate),
        1 => Just(DiskState::Inconsistent),
        1 => Just(DiskState::Outdated),
        1 => Just(DiskState::Failed)
    ];
    let history = proptest::collection::vec(small(), GENERATION_HISTORY_LEN);
    let bits = any::<[bool; 8]>();
    let sessions = (0u64..4, 0u64..2);
    (0u8..3, 1u64..3, (small(), small(), small(), small()), history, states, (bits, sessions)).prop_map(
        |(id, size, (epoch, current, base, copying), history, disk_state, (bits, sessions))| View {
            volume_id: [id; 16],
            size: if size == 1 { 4096 } else { 8192 },
            epoch: Epoch(epoch),
            disk_state,
            zeroed: bits[0],
            was_primary: bits[1],
            was_primary_unclean: bits[2],
            applying_unclean: bits[3],
            lost_power: bits[6],
            dirty: bits[7],
            copying: Generation(copying),
            sessions_offered: sessions.0 + sessions.1,
            sessions_begun: sessions.0,
            role: if bits[4] { ServingRole::Primary } else { ServingRole::Standby },
            configured_primary: bits[5],
            proposed: Lineage { volume_id: [id + 1; 16], generation: epoch + 1 },
            ..disk(current, base, &history)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn both_nodes_decide_the_same(mine in any_view(), theirs in any_view()) {
        prop_assert_eq!(agree(&mine, &theirs).mirrored(), agree(&theirs, &mine));
    }

    #[test]
    fn a_source_is_up_to_date_and_whoever_serves_is_not_overwritten(mine in any_view(), theirs in any_view()) {
        let theirs = View { size: mine.size, volume_id: mine.volume_id, ..theirs };
        let agreement = agree(&mine, &theirs);
        if let Verdict::Resync { source, .. } = agreement.verdict {
            let from = if source == Side::Mine { &mine } else { &theirs };
            prop_assert_eq!(from.disk_state, DiskState::UpToDate);
            prop_assert!(agreement.primary.is_none_or(|primary| primary == source));
        }
        if agreement.primary.is_some() {
            prop_assert!(agreement.allows_session());
        }
    }

    #[test]
    fn an_empty_disk_overwrites_none_that_may_hold_data_before_they_have_met(mine in any_view(), theirs in any_view()) {
        let new = |view: View| View { generations: Generations::default(), size: 4096, volume_id: [0; 16], ..view };
        let (mine, theirs) = (new(mine), new(theirs));
        if let Verdict::Resync { source: Side::Mine, .. } = compare(&mine, &theirs) {
            prop_assert!(!mine.zeroed || !theirs.may_hold_data());
        }
    }

    #[test]
    fn a_disk_of_an_earlier_time_is_no_source_while_the_other_has_its_content(mine in any_view(), theirs in any_view()) {
        let met = |mut view: View| {
            view.generations.current = view.generations.current.max(Generation(1));
            view
        };
        let (mine, theirs) = (met(mine), met(theirs));
        if mine.sessions_offered < theirs.sessions_begun && theirs.disk_state != DiskState::Inconsistent {
            let verdict = compare(&mine, &theirs);
            let source = matches!(verdict, Verdict::Resync { source: Side::Mine, .. } | Verdict::InSync { .. });
            prop_assert!(!source, "{verdict:?}");
        }
    }

    #[test]
    fn what_may_differ_is_never_called_in_sync(mine in any_view(), theirs in any_view()) {
        if matches!(agree(&mine, &theirs).verdict, Verdict::InSync { .. }) {
            prop_assert!(!mine.dirty && !theirs.dirty);
        }
    }

    #[test]
    fn an_up_to_date_disk_is_overwritten_only_from_its_future_or_its_equal(mine in any_view(), theirs in any_view()) {
        let theirs = View { size: mine.size, volume_id: mine.volume_id, ..theirs };
        if let Verdict::Resync { source: Side::Mine, .. } = compare(&mine, &theirs)
            && theirs.disk_state == DiskState::UpToDate
            && theirs.generations.current != Generation::ZERO
        {
            let same = mine.generations.current == theirs.generations.current;
            prop_assert!(same || mine.generations.descends_from(theirs.generations.current));
        }
    }
}

/// Both ends of a session of generation 5 whose link broke after change 7 was acknowledged and 12 sent.
fn parted() -> [View; 2] {
    let recall = Recall {
        session: [21, 22],
        epoch: 3,
        generation: 5,
        source: true,
        applied: 7,
        numbered: 12,
        map_told: true,
        alone: false,
        diskless: false,
    };
    let disk = View { epoch: Epoch(3), ..disk(5, 0, &[]) };
    let source = View { was_primary_unclean: true, recall: Some(recall), ..serving(disk) };
    let target = Recall { source: false, applied: 9, numbered: 9, ..recall };
    [source, View { recall: Some(target), ..disk }]
}

fn agreed(mine: &View, theirs: &View) -> Agreement {
    let agreement = agree(mine, theirs);
    assert_eq!(agree(theirs, mine), agreement.mirrored(), "\nmine   {mine:?}\ntheirs {theirs:?}");
    agreement
}

#[test]
fn a_session_goes_on_from_the_targets_word() {
    let [source, target] = parted();
    let agreement = agreed(&source, &target);
    assert_eq!(agreement.goes_on, Some(9));
    assert_eq!((agreement.verdict, agreement.epoch), (Verdict::InSync { adopt: None }, 3));
    assert_eq!(agreement.primary, Some(Side::Mine));
    // In the middle of a copy, by a source that serves or does not.
    let copied = View {
        copying: Generation(5),
        generations: Generations::default(),
        ..bad(DiskState::Inconsistent, target)
    };
    for source in [source, View { role: ServingRole::Standby, was_primary_unclean: false, ..source }] {
        let agreement = agreed(&source, &copied);
        assert_eq!(agreement.goes_on, Some(9));
        assert_eq!(agreement.verdict, DELTA_MINE(Why::TargetNotUpToDate));
    }
}

#[test]
fn a_session_ends_with_anything_that_is_not_in_it() {
    let [source, target] = parted();
    let recalling = |view: View, change: fn(&mut Recall)| {
        let mut recall = view.recall.expect("both do");
        change(&mut recall);
        View { recall: Some(recall), ..view }
    };
    let advanced = |view: View, current: u64| {
        let mut view = view;
        view.generations.advance(Generation(current), true);
        view
    };
    let over: [(&str, View, View); 11] = [
        ("the target was restarted", source, View { recall: None, ..target }),
        ("the source was", View { recall: None, ..source }, target),
        ("another session", source, recalling(target, |recall| recall.session = [21, 23])),
        ("the source went alone", recalling(advanced(source, 6), |recall| recall.alone = true), target),
        ("the same in a copy's middle", recalling(source, |recall| recall.alone = true), target),
        ("the target was promoted", source, View { epoch: Epoch(4), ..serving(advanced(target, 6)) }),
        ("and gave its role back", source, View { epoch: Epoch(4), ..advanced(target, 6) }),
        ("a later epoch", source, View { epoch: Epoch(4), ..target }),
        ("the target lacks what it acknowledged", source, recalling(target, |recall| recall.applied = 6)),
        ("it has what was never sent", source, recalling(target, |recall| recall.applied = 13)),
        ("its disk failed", source, bad(DiskState::Failed, target)),
    ];
    for (what, source, target) in over {
        assert_eq!(agreed(&source, &target).goes_on, None, "{what}");
    }
    // What is known of a target that lives serves a copy all the same.
    let alone = recalling(advanced(source, 6), |recall| recall.alone = true);
    assert!(knows(&alone, &target) && !knows(&target, &alone));
    assert_eq!(agreed(&alone, &target).verdict, DELTA_MINE(Why::TargetBehind));
    assert!(!knows(&alone, &View { recall: None, ..target }));
}

#[test]
fn a_session_goes_on_without_the_sources_disk() {
    let [source, target] = parted();
    let gone =
        |view: View| View { recall: view.recall.map(|recall| Recall { diskless: true, ..recall }), ..view };
    let mut noted = gone(target);
    noted.generations.advance(Generation(6), false);
    noted.generations.base = Generation::ZERO;
    let source = gone(bad(DiskState::Failed, source));
    let agreement = agreed(&source, &noted);
    assert_eq!(agreement.goes_on, Some(9));
    assert_eq!((agreement.verdict, agreement.primary), (Verdict::InSync { adopt: None }, Some(Side::Mine)));
    let over = [
        ("the target has no record of it", source, gone(target)),
        ("one of them does not know", source, View { recall: target.recall, ..noted }),
        ("it was promoted", source, serving(noted)),
        ("the source does not serve any more", View { role: ServingRole::Standby, ..source }, noted),
        ("the target was restarted", source, View { recall: None, ..noted }),
    ];
    for (what, source, target) in over {
        assert_eq!(agreed(&source, &target).goes_on, None, "{what}");
    }
}
