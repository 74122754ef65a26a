package server

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// Fault F61: many nodes are banned and many certificates are quarantined at the same
// time. Each of the nodes is cut off, told why if it reads in time, none is served again,
// and those that stay are served meanwhile and know all of it in the end.
func TestFault_F61_MassBan(t *testing.T) {
	const nodes, certificates = 60, 1000
	h := newHouse(t)
	h.apply(shopEntry("shop"))
	admin, ctx := h.admin()
	stays := h.join("stays", nil)
	watching := stays.sync(&nodev1.Hello{})
	banned, streams := make([]*testAgent, nodes), make([]*testStream, nodes)
	for i := range banned {
		banned[i] = h.join(fmt.Sprintf("n%d", i), nil)
		streams[i] = banned[i].sync(&nodev1.Hello{})
		if m := streams[i].next(); m.GetSnapshot() == nil {
			t.Fatalf("node %d: %v", i, m)
		}
	}

	start := time.Now()
	var operators errgroup.Group
	operators.SetLimit(16)
	var cut sync.WaitGroup
	var told atomic.Int32
	for i, s := range streams {
		cut.Go(func() {
			said := int32(0)
			for {
				m, err := s.stream.Recv()
				if err != nil {
					told.Add(said)
					return
				}
				if m.GetEvicted().GetBanned() {
					said = 1
				}
			}
		})
		operators.Go(func() error {
			_, err := admin.BanNode(ctx, &adminv1.BanNodeRequest{Id: banned[i].id, Reason: "taken over"})
			return err
		})
	}
	for i := range certificates {
		operators.Go(func() error {
			_, err := admin.AddQuarantine(ctx, &adminv1.AddQuarantineRequest{Quarantine: &adminv1.Quarantine{
				Serial: binary.BigEndian.AppendUint64([]byte{1}, uint64(i)), Reason: "stolen",
			}})
			return err
		})
	}
	changed := make(chan error, 1)
	go func() { changed <- operators.Wait() }()
	// Who stays is served all the time.
	for over := false; !over; {
		select {
		case err := <-changed:
			if err != nil {
				t.Fatal(err)
			}
			over = true
		default:
		}
		if r := stays.issue(stays.item("shop", workload("shop")))[0]; r.GetSvid() == nil {
			t.Fatalf("who stays gets %v", r)
		}
	}
	cut.Wait()
	t.Logf("%d nodes, of which %d were told, and %d certificates in %s", nodes, told.Load(), certificates, time.Since(start).Round(time.Millisecond))
	for _, a := range banned {
		h.wantCode(h.reconnectAndIssue(a), codes.PermissionDenied)
	}
	for {
		m := watching.next()
		if n := len(m.GetQuarantines().GetSerials()); n == certificates {
			break
		}
	}
}
