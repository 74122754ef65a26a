package ledger

import (
	"testing"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

func TestSize(t *testing.T) {
	dir := t.TempDir()
	if n, err := Size(dir); n != 0 || err != nil {
		t.Errorf("an empty folder: %d, %v", n, err)
	}
	j, err := Open(dir, Options{SegmentBytes: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	for want := range uint64(100) {
		if n, err := Size(dir); n != want || err != nil {
			t.Fatalf("after %d records: %d, %v", want, n, err)
		}
		if _, err := j.Append(t.Context(), NewDraft(&ledgerv1.Record{Version: 1, Detail: "something to fill the segment with"}, nil)); err != nil {
			t.Fatal(err)
		}
	}
}
