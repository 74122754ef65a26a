package ca

import (
	"math"
	"testing"
	"time"
)

// TestV_I11_RenewalHerd: ten thousand SVIDs that were issued at one instant, as
// after an outage, are renewed at no more than twice the steady rate, in each
// hundredth of their life, and all while most of their life is left to try again.
func TestV_I11_RenewalHerd(t *testing.T) {
	const fleet = 10_000
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	life := time.Hour
	var load [100]int
	for range fleet {
		at := renewAt(now, now.Add(life)).Sub(now)
		if at < 35*life/100 || at > 65*life/100 {
			t.Fatalf("renewal after %v of %v", at, life)
		}
		load[at*100/life]++
	}
	steady := float64(fleet) / 50 // each is renewed at half of its life
	noise := 4 * math.Sqrt(2*steady)
	for i, n := range load {
		if float64(n) > 2*steady+noise {
			t.Errorf("%d renewals in hundredth %d of the life, the steady rate is %.0f", n, i, steady)
		}
	}
}
