package unix

import (
	"context"
	"errors"
	"testing"

	"github.com/meshid/meshid/pkg/attest"
)

// Who gives up does not end what is under way: the next one finds it done.
func TestHashingOutlivesWhoAsked(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	started, release, saw := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		<-started
		cancel()
	}()
	_, err := newHashes(1).bounded(ctx, 1, func(ctx context.Context) (*attest.Facts, error) {
		close(started)
		<-release
		if _, ok := ctx.Deadline(); !ok {
			saw <- errors.New("it has no bound")
		} else {
			saw <- ctx.Err()
		}
		return nil, nil //nolint:nilnil // nobody looks at it
	}, func() { t.Error("it did not begin") })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("who asked hears %v", err)
	}
	close(release)
	if err := <-saw; err != nil {
		t.Errorf("what is under way ends: %v", err)
	}
}
