package server

import (
	"strings"
	"testing"

	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// What an agent says about its proxies is bounded, and what is refused changes
// nothing.
func TestAcksAreBounded(t *testing.T) {
	f := inForce{streams: 7}
	long := strings.Repeat("x", maxLaggardName+1)
	for _, m := range []*nodev1.BundleAcks{
		{Laggards: make([]*nodev1.Laggard, maxNodeLaggards+1)},
		{Held: make([]*nodev1.Held, maxHeldRoots+1)},
		{Laggards: []*nodev1.Laggard{{Name: long}}},
		{Held: []*nodev1.Held{{Root: long}}},
	} {
		if err := f.acks(m); err == nil || f.streams != 7 || f.reported {
			t.Errorf("%.80v: %v, %+v", m, err, f)
		}
	}
	if err := f.acks(&nodev1.BundleAcks{Streams: 2, Acknowledged: 1, Sequence: 3, Counted: true, Held: []*nodev1.Held{{Root: "r", Svids: 4}}}); err != nil {
		t.Fatal(err)
	}
	if !f.reported || !f.counted || f.streams != 2 || f.ackSequence != 3 || f.held["r"] != 4 {
		t.Errorf("%+v", f)
	}
}
