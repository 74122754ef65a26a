package main

import (
	"strings"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/agent"
)

// A proxy has streams that carry no trust bundle: nobody waits for their
// acknowledgement of one.
func TestWriteStatus_BundleStreams(t *testing.T) {
	var out strings.Builder
	if err := writeStatus(&out, &agent.Status{BundleSequence: 7, Streams: 2, BundleStreams: 1, Acknowledged: 1}, time.Now()); err != nil {
		t.Fatal(err)
	}
	if want := "bundle sequence 7 acknowledged by 1 of 1 streams that carry it"; !strings.Contains(out.String(), want) {
		t.Errorf("it says %q, not %q", out.String(), want)
	}
}
