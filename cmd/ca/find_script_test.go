package main

import (
	"context"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ledger"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// writePast is a program for scripts: it makes the journal of a CA with a past
// in the folder that is its argument, and writes a certificate that is in it to
// the file that is the second.
func writePast(args []string) (err error) {
	j, err := ledger.Open(args[0], ledger.Options{SegmentBytes: 4 << 10})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.Close()) }()
	old := time.Date(2026, 3, 28, 23, 30, 0, 0, time.UTC) // the night in which summer time begins in Berlin
	recent := time.Now().Add(-50 * time.Minute)
	const orders, web = "spiffe://example.org/shop/orders", "spiffe://example.org/shop/web"
	first := issuance(old.Add(time.Minute), 1, orders, "web-1", "orders")
	first.Entry.Revision = 1
	records := []*ledgerv1.Record{
		change(old, 1, `docker.labels["app"] == "orders"`, "+name: shop\n"),
		first,
		refusal(old.Add(2*time.Minute), orders, "web-2"),
		change(old.Add(time.Hour), 2, `docker.labels["app"] != ""`, " name: shop\n-a\n+b\n"),
		issuance(old.Add(2*time.Hour), 2, orders, "web-1", "orders"),
		issuance(old.Add(2*time.Hour+time.Minute), 3, web, "web-1", "web"),
	}
	for i := range 30 {
		records = append(records, issuance(old.Add(3*time.Hour), 100+i, web, "web-3", "web"))
	}
	records = append(records, issuance(recent, 200, orders, "web-1", "orders"), issuance(time.Now(), 201, web, "web-2", "web"))
	// The intermediate chains to a root that is no more.
	for i, a := range []*ledgerv1.Authority{
		{Id: "5f5e5d5c5b5a59585756555453525150504f4e4d", Role: "root", State: "retiring", Sha256: certificate(1)},
		{Id: "0a1b2c3d", Role: "intermediate", State: "retiring", Root: "5f5e5d5c5b5a59585756555453525150504f4e4d"},
	} {
		records = append(records, &ledgerv1.Record{
			Version: 1, Time: timestamppb.New(recent.Add(time.Duration(i))), Event: ledgerv1.Event_EVENT_AUTHORITY, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
			TrustDomain: "example.org", CaInstance: "ca-1", Authority: a,
		})
	}
	for _, r := range records {
		if _, err := j.Append(context.Background(), ledger.NewDraft(r, nil)); err != nil {
			return err
		}
	}
	return os.WriteFile(args[1], pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate(2)}), 0o600)
}

// certificate stands for a certificate: nobody looks into it.
func certificate(n int) []byte { return append([]byte{0x30, 0x03}, fmt.Sprintf("%03d", n)...) }

func change(at time.Time, revision uint64, workloads, diff string) *ledgerv1.Record {
	return &ledgerv1.Record{
		Version: 1, Time: timestamppb.New(at), Event: ledgerv1.Event_EVENT_ENTRY_APPLIED, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
		TrustDomain: "example.org", Actor: "uid:0", CaInstance: "ca-1", RequestId: fmt.Sprintf("c%d", revision),
		Entry: &ledgerv1.EntryRef{Name: "shop", Revision: revision}, Diff: diff,
		Definition: &entryv1.Entry{
			Name: "shop", SpiffeId: `spiffe://example.org/shop/{docker.labels["app"]}`, Nodes: `node.method == "join_token"`,
			Workloads: workloads + ` && docker.image.startsWith("registry.internal/")`, Ttl: durationpb.New(time.Hour), Revision: revision,
		},
	}
}

func issuance(at time.Time, n int, id, node, app string) *ledgerv1.Record {
	sum := sha256.Sum256(certificate(n))
	key := sha256.Sum256(sum[:])
	return &ledgerv1.Record{
		Version: 1, Time: timestamppb.New(at), Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
		TrustDomain: "example.org", SpiffeId: id, Kind: ledgerv1.Kind_KIND_FIRST, VerifiedBy: "agent", CaInstance: "ca-1", RequestId: fmt.Sprintf("r%d", n),
		Certificate: &ledgerv1.Certificate{
			Serial: key[:16], Sha256: sum[:], SpkiSha256: key[:], NotBefore: timestamppb.New(at), NotAfter: timestamppb.New(at.Add(time.Hour)),
		},
		Instance: fmt.Sprintf("docker:%d", n),
		Workload: &attributesv1.Workload{Docker: &attributesv1.Docker{
			ContainerId: fmt.Sprint(n), Name: app + "-\x1b[2J\u202e" + fmt.Sprint(n), Image: "registry.internal/" + app, Labels: map[string]string{"app": app},
		}},
		Node: &ledgerv1.NodeRef{
			Id: "spiffe://example.org/meshid/node/join_token/" + node, Attributes: &attributesv1.Node{Method: "join_token", Id: node},
		},
		Entry: &ledgerv1.EntryRef{Name: "shop", Revision: 2}, Authority: &ledgerv1.Authority{Id: "0a1b2c3d", Role: "intermediate"},
	}
}

func refusal(at time.Time, id, node string) *ledgerv1.Record {
	r := issuance(at, 0, id, node, "orders")
	r.Outcome, r.Reason, r.Certificate = ledgerv1.Outcome_OUTCOME_REFUSED, "rule_not_matched", nil
	r.Detail = "=cmd|' /C calc'!A0\x1b]0;owned\x07"
	return r
}
