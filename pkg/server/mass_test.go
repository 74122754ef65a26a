package server

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/server/registry"
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

// Fault F61 at its full size: 5,000 nodes are banned by one call. All are in force from
// the answer on and after a restart, each is told, each has its record, all of them in
// one withdrawal; and one that is not known keeps all from being banned.
func TestFault_F61_MassBan_AtOnce(t *testing.T) {
	const nodes = 5000
	h := newHouse(t)
	h.apply(shopEntry("shop"))
	admin, ctx := h.admin()
	stays, real := h.join("stays", nil), h.join("real", nil)
	h.join("bystander", nil)
	known, ok := h.server.registry.Node(real.id)
	if !ok {
		t.Fatal("the node is not known")
	}
	ids := []string{real.id}
	fleet := make([]*registry.Node, nodes-1)
	var told, left atomic.Int32
	var streams sync.WaitGroup
	for i := range fleet {
		n := *known
		n.ID = fmt.Sprintf("%s-%d", known.ID, i)
		fleet[i], ids = &n, append(ids, n.ID)
		h.server.registry.PutNode(&n)
		if i%2 == 1 {
			continue // it is away
		}
		session, err := h.server.hub.open(n.ID, n.Serial)
		if err != nil {
			t.Fatal(err)
		}
		streams.Go(func() { // as a stream's handler does
			defer h.server.hub.close(session)
			for {
				select {
				case <-session.wake:
					if session.eviction().GetBanned() {
						told.Add(1)
						return
					}
				case <-session.done:
					left.Add(1)
					return
				}
			}
		})
	}
	if _, err := admin.BanNode(ctx, &adminv1.BanNodeRequest{Ids: append(slices.Clone(ids), known.ID+"-unknown"), Reason: "taken over"}); err == nil {
		t.Fatal("a node that is not known is banned")
	}
	if n := len(h.records(ledgerv1.Event_EVENT_BAN)); n != 0 || told.Load() > 0 {
		t.Fatalf("%d records and %d told, though not all can be banned", n, told.Load())
	}

	began := time.Now()
	answered := make(chan error, 1)
	var answer *adminv1.BanNodeResponse
	go func() {
		var err error
		answer, err = admin.BanNode(ctx, &adminv1.BanNodeRequest{Id: real.id, Ids: ids, Reason: "taken over"})
		answered <- err
	}()
	for over := false; !over; { // who stays is served all the time
		select {
		case err := <-answered:
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
	t.Logf("%d nodes in %s", nodes, time.Since(began).Round(time.Millisecond))
	streams.Wait()
	if told.Load() != nodes/2 || left.Load() != 0 || answer.GetNodes() != nodes {
		t.Errorf("%d were told and %d not, of %d; the answer has %d", told.Load(), left.Load(), nodes/2, answer.GetNodes())
	}
	h.wantCode(h.reconnectAndIssue(real), codes.PermissionDenied)
	recorded := make(map[string]bool)
	for _, r := range h.records(ledgerv1.Event_EVENT_BAN) {
		recorded[r.GetNode().GetId()] = true
	}
	if len(recorded) != nodes {
		t.Errorf("%d nodes are recorded", len(recorded))
	}
	w := h.withdrawal(answer.GetWithdrawal(), func(w *adminv1.Withdrawal) bool { return w.GetState() != "pending" || w.GetNodesApplied() >= nodes/2 })
	if w.GetNodes() != nodes || !strings.HasSuffix(w.GetWhat(), " and 4997 more") {
		t.Errorf("the withdrawal is %v", w)
	}
	h.stop()
	h.start()
	banned := 0
	for _, n := range h.server.registry.Nodes() {
		if n.State == registry.Banned {
			banned++
		}
	}
	if banned != nodes {
		t.Errorf("%d are banned after a restart", banned)
	}
}

// The same with what is quarantined, and lifted.
func TestFault_F61_MassQuarantine_AtOnce(t *testing.T) {
	const certificates = 5000
	h := newHouse(t)
	admin, ctx := h.admin()
	all := make([]*adminv1.Quarantine, certificates)
	for i := range all {
		all[i] = &adminv1.Quarantine{Serial: binary.BigEndian.AppendUint64([]byte{1}, uint64(i)), Reason: "stolen"}
	}
	watching := h.join("watching", nil).sync(&nodev1.Hello{})
	count := func() int { return h.server.registry.Quarantines().Len() }
	for name, wrong := range map[string]*adminv1.Quarantine{
		"no reason":            {Serial: []byte{7}},
		"nothing":              {Reason: "stolen"},
		"another trust domain": {SpiffeId: "spiffe://other.org/web", Reason: "stolen"},
	} {
		if _, err := admin.AddQuarantine(ctx, &adminv1.AddQuarantineRequest{Quarantines: append(slices.Clone(all), wrong)}); err == nil || count() != 0 {
			t.Errorf("%s: %v, and %d are quarantined", name, err, count())
		}
	}
	began := time.Now()
	if _, err := admin.AddQuarantine(ctx, &adminv1.AddQuarantineRequest{Quarantine: all[0], Quarantines: all}); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d certificates in %s", certificates, time.Since(began).Round(time.Millisecond))
	if n := len(h.records(ledgerv1.Event_EVENT_QUARANTINE)); n != certificates || count() != certificates {
		t.Errorf("%d are recorded and %d quarantined", n, count())
	}
	changes := 0
	for len(watching.next().GetQuarantines().GetSerials()) != certificates {
		if changes++; changes > 10 {
			t.Fatal("the agent is told of each of them")
		}
	}
	if _, err := admin.LiftQuarantine(ctx, &adminv1.LiftQuarantineRequest{Quarantines: append(slices.Clone(all), &adminv1.Quarantine{Serial: []byte{7}})}); err == nil || count() != certificates {
		t.Errorf("one that is not quarantined: %v, and %d are left", err, count())
	}
	if _, err := admin.LiftQuarantine(ctx, &adminv1.LiftQuarantineRequest{Quarantines: all[1:]}); err != nil || count() != 1 {
		t.Errorf("%v, and %d are left", err, count())
	}
	h.stop()
	h.start()
	if count() != 1 {
		t.Errorf("%d are left after a restart", count())
	}
}
