"Times two functions against each other in one run, interleaved, so that a busy machine slows both."

import statistics, time


def compare(subject, ours, peer_name, peer, repeats=15, note=''):
    """A row: median times of `ours` and `peer`, and the median of their ratios, turn by turn
    (above 1: ours is faster). `work` is that median in processor time, which counts neither other
    programs nor a thread that sleeps until another is done."""
    ours()
    peer()  # warm-up
    times, work = [], []
    for k in range(repeats):
        pair, used = {}, {}
        for who, fn in (
            (('ours', ours), ('peer', peer)) if k % 2 else (('peer', peer), ('ours', ours))
        ):
            t0, w0 = time.perf_counter(), time.process_time()
            fn()
            pair[who], used[who] = time.perf_counter() - t0, time.process_time() - w0
        times.append(pair)
        work.append(used['peer'] / used['ours'])
    ratios = sorted(t['peer'] / t['ours'] for t in times)
    quarter = len(ratios) // 4
    return dict(
        subject=subject,
        peer=peer_name,
        ours_ms=1e3 * statistics.median(t['ours'] for t in times),
        peer_ms=1e3 * statistics.median(t['peer'] for t in times),
        ratio=statistics.median(ratios),
        middle_half=f'{ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f}',
        work=statistics.median(work),
        note=note,
    )
