package server

import (
	"math"
	"slices"
	"time"
)

// delays are times, kept as counts in ranges that grow by 5 %: from a millisecond to
// a day. The zero value has none.
type delays struct {
	counts map[int]uint64
	total  uint64
	max    time.Duration
}

const delayGrowth = 1.05

func (d *delays) add(t time.Duration, n uint32) {
	if d.counts == nil {
		d.counts = make(map[int]uint64)
	}
	t = min(max(t, 0), 24*time.Hour)
	d.counts[int(math.Ceil(math.Log(max(t.Seconds()*1000, 1))/math.Log(delayGrowth)))] += uint64(n)
	d.total += uint64(n)
	d.max = max(d.max, t)
}

// quantile returns the upper end of the range that the quantile is in.
func (d *delays) quantile(q float64) time.Duration {
	rank, seen := uint64(math.Ceil(q*float64(d.total))), uint64(0)
	ranges := make([]int, 0, len(d.counts))
	for r := range d.counts {
		ranges = append(ranges, r)
	}
	slices.Sort(ranges)
	for _, r := range ranges {
		if seen += d.counts[r]; seen >= rank {
			upper := time.Duration(math.Pow(delayGrowth, float64(r)) * float64(time.Millisecond))
			return min(upper, d.max)
		}
	}
	return d.max
}
