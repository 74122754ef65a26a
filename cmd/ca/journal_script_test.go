package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/tools/txtar"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// scriptJournal makes a journal for the scripts: the decisions of one day, among
// them such as no CA would have made.
type scriptJournal struct {
	journal *ledger.Journal
	at      time.Time
	serial  byte
}

// makeJournal is the program `makejournal DIR [old]` of the scripts. An old
// journal is one of a version that recorded neither starts nor whole entries.
func makeJournal() int {
	if err := writeJournal(os.Args[1], len(os.Args) > 2); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func writeJournal(dir string, old bool) (err error) {
	journal, err := ledger.Open(dir, ledger.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, journal.Close()) }()
	s := &scriptJournal{journal: journal, at: time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC)}
	return s.write(old)
}

var update = flag.Bool("update", false, "write the example of a record in docs/audit.md")

// TestRecordInDocs holds the example in docs/audit.md to what the programs print.
func TestRecordInDocs(t *testing.T) {
	const begin = "```json golden=record\n"
	page, err := os.ReadFile("../../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(page), begin)
	got, _, ok := strings.Cut(rest, "```")
	if !ok {
		t.Fatal("docs/audit.md has no example of a record")
	}
	dir := t.TempDir()
	if err := writeJournal(dir, false); err != nil {
		t.Fatal(err)
	}
	for e, err := range ledger.Scan(dir, 3) {
		if err != nil {
			t.Fatal(err)
		}
		line, err := ledger.FormatJSON(e)
		if err != nil {
			t.Fatal(err)
		}
		// The chain begins with the journal's name, which is random.
		line = bytes.Replace(line, []byte(hex.EncodeToString(e.Link[:])), []byte("…"), 1)
		var want bytes.Buffer
		if err := json.Indent(&want, line, "", "  "); err != nil {
			t.Fatal(err)
		}
		if *update {
			fresh := strings.Replace(string(page), begin+got, begin+want.String()+"\n", 1)
			if err := os.WriteFile("../../docs/audit.md", []byte(fresh), 0o644); err != nil {
				t.Fatal(err)
			}
			return
		}
		if diff := cmp.Diff(want.String()+"\n", got); diff != "" {
			t.Errorf("the example in docs/audit.md is not what is printed (-want +got):\n%s", diff)
		}
		return
	}
}

// TestAnswersInDocs holds the answers that docs/audit.md shows to those that the
// scripts compare with what is printed.
func TestAnswersInDocs(t *testing.T) {
	page, err := os.ReadFile("../../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	for script, answer := range map[string]string{"why": "issued.txt", "replay": "stricter.txt"} {
		archive, err := txtar.ParseFile("testdata/script/" + script + ".txtar")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range archive.Files {
			if f.Name == answer && !bytes.Contains(page, f.Data) {
				t.Errorf("docs/audit.md does not show what %s.txtar has as %s", script, answer)
			}
		}
	}
}

func (s *scriptJournal) write(old bool) error {
	shop := &entryv1.Entry{
		Name: "shop", SpiffeId: `spiffe://example.org/shop/{docker.labels["app"]}`,
		Nodes:     `node.method == "join_token" && node.labels["zone"] == "a"`,
		Workloads: `docker.labels["team"] == "shop" && (docker.image.startsWith("registry.internal/shop/") || docker.image == "registry.internal/tools")`,
		DnsNames:  []string{`{docker.labels["app"]}.shop.internal`}, Ttl: durationpb.New(time.Hour), Revision: 1,
	}
	operator := &entryv1.Entry{
		Name: "operator", SpiffeId: "spiffe://example.org/operator", Workloads: `unix.uid == 1001 && unix.sha256 == "00"`,
		Admin: true, Revision: 2,
	}
	if old {
		r := s.record(ledgerv1.Event_EVENT_ENTRY_APPLIED)
		r.Entry = s.ref(shop)
		if err := s.append(r); err != nil {
			return err
		}
		return s.append(s.issued(shop, "web", "c1"))
	}
	web := s.issued(shop, "web", "c1")
	none := s.refused(shop, "rule_not_matched", "c2", func(r *ledgerv1.Record) { r.Workload.Docker.Labels["team"] = "blog" })
	wrongName := s.issued(shop, "db", "c3")
	wrongName.SpiffeId = "spiffe://example.org/shop/payments"
	wrongTeam := s.issued(shop, "web", "c4")
	wrongTeam.Workload.Docker.Labels["team"] = "blog"
	longLife := s.issued(shop, "web", "c5")
	longLife.Certificate.NotAfter = timestamppb.New(longLife.GetCertificate().GetNotAfter().AsTime().Add(23 * time.Hour))
	wrongDigest := s.issued(shop, "web", "c6")
	wrongDigest.Entry = &ledgerv1.EntryRef{Name: "shop", Revision: 7, Digest: make([]byte, 32)}
	never := s.refused(shop, "rule_not_matched", "c7", func(*ledgerv1.Record) {})
	csr := s.refused(shop, "csr", "c8", func(r *ledgerv1.Record) { r.Detail = "certificate signing request: its signature is wrong" })
	unknown := s.refused(shop, "entry_unknown", "c9", func(r *ledgerv1.Record) { r.Entry = &ledgerv1.EntryRef{Name: "gone"} })
	apply := s.applied(shop)
	admin := s.applied(operator)
	deleted := s.record(ledgerv1.Event_EVENT_ENTRY_DELETED)
	deleted.Entry, deleted.Definition, deleted.Actor = &ledgerv1.EntryRef{Name: "shop", Revision: 3}, shop, "uid:0"
	started := s.record(ledgerv1.Event_EVENT_STARTED)
	for _, r := range []*ledgerv1.Record{
		started, apply, admin, // 0 to 2
		web, s.renewed(web), none, wrongName, wrongTeam, longLife, wrongDigest, never, csr, unknown, // 3 to 12
		deleted, s.issued(shop, "late", "c10"), // 13 and 14
	} {
		s.at = s.at.Add(time.Minute)
		if r == started {
			s.at = s.at.Add(-time.Minute)
		}
		r.Time = timestamppb.New(s.at)
		if err := s.append(r); err != nil {
			return err
		}
	}
	return nil
}

func (s *scriptJournal) record(event ledgerv1.Event) *ledgerv1.Record {
	return &ledgerv1.Record{
		Version: 1, Time: timestamppb.New(s.at), Event: event, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
		TrustDomain: "example.org", CaInstance: "ca-1", CaVersion: "v1.0.0",
	}
}

func (s *scriptJournal) ref(e *entryv1.Entry) *ledgerv1.EntryRef {
	compiled, err := identity.Compile(spiffeid.RequireTrustDomainFromString("example.org"), e)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return nil
	}
	digest := compiled.Digest()
	return &ledgerv1.EntryRef{Name: e.GetName(), Revision: e.GetRevision(), Digest: digest[:]}
}

func (s *scriptJournal) applied(e *entryv1.Entry) *ledgerv1.Record {
	r := s.record(ledgerv1.Event_EVENT_ENTRY_APPLIED)
	r.Entry, r.Definition, r.Actor = s.ref(e), e, "uid:0"
	return r
}

func (s *scriptJournal) decision(e *entryv1.Entry, app, container string) *ledgerv1.Record {
	r := s.record(ledgerv1.Event_EVENT_ISSUE)
	r.Entry, r.Instance, r.VerifiedBy = s.ref(e), "docker:"+container, "agent"
	r.Attestors = []string{"unix", "docker"}
	r.Process = &attributesv1.Process{Pid: 4711, StartTime: timestamppb.New(s.at.Add(-time.Second))}
	r.RequestId, r.Took = "5ac0e2a7c1f0b3d4", durationpb.New(412*time.Microsecond)
	r.Workload = &attributesv1.Workload{
		Unix: &attributesv1.Unix{Uid: 1000, Gid: 1000, Path: "/" + app},
		Docker: &attributesv1.Docker{
			ContainerId: container, Image: "registry.internal/shop/" + app, Labels: map[string]string{"app": app, "team": "shop"},
		},
	}
	r.Node = &ledgerv1.NodeRef{
		Id: "spiffe://example.org/meshid/node/join_token/web-1", Address: "192.0.2.7:41234", AgentVersion: "v1.0.0",
		Attributes: &attributesv1.Node{Method: "join_token", Id: "web-1", Labels: map[string]string{"zone": "a"}},
	}
	return r
}

func (s *scriptJournal) issued(e *entryv1.Entry, app, container string) *ledgerv1.Record {
	r := s.decision(e, app, container)
	s.serial++
	sum := sha256.Sum256([]byte{s.serial})
	r.Kind, r.SpiffeId = ledgerv1.Kind_KIND_FIRST, "spiffe://example.org/shop/"+app
	r.Certificate = &ledgerv1.Certificate{
		Serial: []byte{0x7f, s.serial}, Sha256: sum[:], SpkiSha256: sum[:], KeyAlgorithm: "EC-P256",
		NotBefore: timestamppb.New(s.at.Add(-5 * time.Minute)), NotAfter: timestamppb.New(s.at.Add(time.Hour)),
		DnsNames: []string{app + ".shop.internal"},
	}
	issuer := sha256.Sum256([]byte("intermediate"))
	r.Authority = &ledgerv1.Authority{
		Id: hex.EncodeToString(issuer[:20]), Role: "intermediate", State: "active", Sha256: issuer[:],
		NotAfter: timestamppb.New(s.at.AddDate(0, 0, 7)), BundleSequence: 1,
	}
	return r
}

func (s *scriptJournal) renewed(before *ledgerv1.Record) *ledgerv1.Record {
	r := proto.CloneOf(before)
	s.serial++
	r.Kind, r.PreviousSerial, r.Certificate.Serial = ledgerv1.Kind_KIND_RENEWAL, before.GetCertificate().GetSerial(), []byte{0x7f, s.serial}
	return r
}

func (s *scriptJournal) refused(e *entryv1.Entry, reason, container string, change func(*ledgerv1.Record)) *ledgerv1.Record {
	r := s.decision(e, "web", container)
	r.Outcome, r.Reason = ledgerv1.Outcome_OUTCOME_REFUSED, reason
	change(r)
	return r
}

func (s *scriptJournal) append(r *ledgerv1.Record) error {
	_, err := s.journal.Append(context.Background(), ledger.NewDraft(r, nil))
	return err
}
