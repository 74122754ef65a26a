package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

const (
	pageRows        = 5000 // of one call, for --all
	completionDelay = 2 * time.Second
	timeColumn      = "2006-01-02T15:04:05.000Z07:00"
)

// listFlags are what all questions to the ledger have in common.
type listFlags struct {
	c     clientFlags
	out   cli.OutputFlag
	limit uint32
	all   bool
	tz    string
}

func (f *listFlags) add(cmd *cobra.Command) {
	f.c.add(cmd)
	f.out.Add(cmd, "table", "json", "jsonl", "csv")
	cmd.Flags().Uint32Var(&f.limit, "limit", 100, "how many to show at most")
	cmd.Flags().BoolVar(&f.all, "all", false, "show all, as they come")
	cmd.Flags().StringVar(&f.tz, "tz", "local", "time zone of times that are shown, and of those that are given without one: local, UTC, or a name such as Europe/Berlin")
	cmd.MarkFlagsMutuallyExclusive("limit", "all")
}

// when reads the times that were given; an empty one is absent.
func (f *listFlags) when(flag, value string) (*timestamppb.Timestamp, error) {
	if value == "" {
		return nil, nil //nolint:nilnil // absent
	}
	zone, err := cli.Zone(f.tz)
	if err != nil {
		return nil, fmt.Errorf("--tz: %w", err)
	}
	t, err := cli.Time(value, time.Now(), zone)
	if err != nil {
		return nil, fmt.Errorf("--%s %w", flag, err)
	}
	return timestamppb.New(t), nil
}

// part is one message of a list.
type part[R any] interface {
	*R
	GetNextPageToken() string
}

// asking begins one call for a part of a list.
type asking[R any] func(ctx context.Context, client adminv1.LedgerServiceClient, p *adminv1.Page) (grpc.ServerStreamingClient[R], error)

// list asks for a list page by page, and hands each part to show, which adds it to
// rows.
func list[R any, M part[R]](cmd *cobra.Command, f *listFlags, rows *cli.Rows, ask asking[R], show func(m M) error) (err error) {
	conn, closeConn, err := f.c.dial(cmd.Context())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeConn()) }()
	client := adminv1.NewLedgerServiceClient(conn)
	token := ""
	for {
		p := &adminv1.Page{Limit: f.limit, Token: token}
		if f.all {
			p.Limit = pageRows
		} else {
			p.Limit = min(f.limit-uint32(rows.Len()), pageRows) //nolint:gosec // G115: no more rows than the limit are shown
		}
		var behind string
		if token, behind, err = onePage(cmd.Context(), client, p, ask, show); err != nil {
			return err
		}
		if behind != "" {
			fmt.Fprintf(cmd.ErrOrStderr(), "the newest %s records could not be searched yet: see ledger_search in ca status, and ask again\n", behind)
		}
		if err := rows.Flush(); err != nil {
			return err
		}
		enough := !f.all && rows.Len() >= int(f.limit)
		if token == "" || enough {
			if token != "" {
				fmt.Fprintf(cmd.ErrOrStderr(), "there are more than these %d: see --limit and --all\n", rows.Len())
			}
			if rows.Len() == 0 {
				fmt.Fprintln(cmd.ErrOrStderr(), "nothing found")
			}
			return rows.Close()
		}
	}
}

// onePage is one call. behind is the number of the newest records that it could not
// search, if there are any.
func onePage[R any, M part[R]](ctx context.Context, client adminv1.LedgerServiceClient, p *adminv1.Page, ask asking[R], show func(m M) error) (token, behind string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*callTimeout)
	defer cancel()
	stream, err := ask(ctx, client, p)
	if err != nil {
		return "", "", err
	}
	for {
		raw, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return token, strings.Join(stream.Trailer().Get(search.BehindTrailer), ""), nil
		}
		if err != nil {
			return "", "", err
		}
		m := M(raw)
		token = m.GetNextPageToken()
		if err := show(m); err != nil {
			return "", "", err
		}
	}
}

// zone is the time zone in which times are shown.
func (f *listFlags) begin() (format string, zone *time.Location, err error) {
	if format, err = f.out.Format(); err != nil {
		return "", nil, err
	}
	if zone, err = cli.Zone(f.tz); err != nil {
		return "", nil, fmt.Errorf("--tz: %w", err)
	}
	if f.limit == 0 {
		return "", nil, errors.New("--limit 0: write how many to show, or --all")
	}
	return format, zone, nil
}

// enumNames are the short names of an enum's values, such as "entry_applied".
func enumNames(d protoreflect.EnumDescriptor, prefix string) []string {
	var list []string
	for i := 1; i < d.Values().Len(); i++ {
		list = append(list, strings.ToLower(strings.TrimPrefix(string(d.Values().Get(i).Name()), prefix)))
	}
	return list
}

// enumNumber is the opposite of enumNames; "" is 0.
func enumNumber(d protoreflect.EnumDescriptor, prefix, flag, name string) (protoreflect.EnumNumber, error) {
	if name == "" {
		return 0, nil
	}
	v := d.Values().ByName(protoreflect.Name(prefix + strings.ToUpper(name)))
	if v == nil || v.Number() == 0 {
		return 0, fmt.Errorf("--%s %q: write one of %s", flag, name, strings.Join(enumNames(d, prefix), ", "))
	}
	return v.Number(), nil
}

// hexFlag reads hexadecimal as other programs print it: with or without colons, or
// with 0x before it.
func hexFlag(flag, value string) ([]byte, error) {
	digits := strings.TrimPrefix(strings.ToLower(strings.ReplaceAll(value, ":", "")), "0x")
	if len(digits)%2 == 1 {
		digits = "0" + digits
	}
	b, err := hex.DecodeString(digits)
	if err != nil {
		return nil, fmt.Errorf("--%s %q is not hexadecimal, such as 7f3a12 or 7F:3A:12", flag, value)
	}
	return b, nil
}

// certificateHash returns the SHA-256 of the certificate in a PEM or DER file; of
// a chain, of the first.
func certificateHash(stdin io.Reader, file string) ([]byte, error) {
	const most = 1 << 20
	in := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("--cert: %w", err)
		}
		defer f.Close() //nolint:errcheck // it was only read from
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, most))
	if err != nil {
		return nil, fmt.Errorf("--cert: %w", err)
	}
	if block, _ := pem.Decode(b); block != nil {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("--cert %s: the file begins with a %s, not with a CERTIFICATE", file, block.Type)
		}
		b = block.Bytes
	}
	if len(b) == 0 || b[0] != 0x30 {
		return nil, fmt.Errorf("--cert %s: there is no certificate in it, in PEM or DER", file)
	}
	sum := sha256.Sum256(b)
	return sum[:], nil
}

// findFlags are the filters of `ca ledger find`.
type findFlags struct {
	listFlags
	req                   adminv1.FindRequest
	event, outcome        string
	serial, cert, key     string
	since, until, anomaly string
	oldest                bool
}

func newLedgerFind() *cobra.Command {
	f := &findFlags{}
	cmd := &cobra.Command{
		Use:   "find",
		Short: "Find records, by who, where, what and when",
		Long: `Find asks the running CA for the records for which all filters hold, the newest
first. Times are RFC 3339, or a date or time in the zone of --tz, or how long ago:
90m, 24h, 7d.`,
		Example: `  ca ledger find --node web-1 --since 2026-11-23T02:00 --until 2026-11-23T05:30 --all -o csv
  ca ledger find --spiffe-id spiffe://example.org/shop/orders --outcome refused
  ca ledger find --cert seen-on-the-wire.pem -o json
  ca ledger find --anomaly key_reuse --since 7d`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	f.add(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.req.SpiffeId, "spiffe-id", "", "SPIFFE ID of the certificate that was issued, or asked for")
	flags.StringVar(&f.req.Node, "node", "", "node: its SPIFFE ID, or the last part of it")
	flags.StringVar(&f.req.Entry, "entry", "", "name of the entry that allowed it, or came nearest")
	flags.Uint64Var(&f.req.Revision, "revision", 0, "revision of the entry")
	flags.StringVar(&f.event, "event", "", "what was decided: "+strings.Join(enumNames(ledgerv1.Event(0).Descriptor(), "EVENT_"), ", "))
	flags.StringVar(&f.outcome, "outcome", "", "success, refused or error")
	flags.StringVar(&f.req.Reason, "reason", "", "reason of a refusal, such as rule_not_matched")
	flags.StringVar(&f.req.Actor, "actor", "", "who asked, for changes: uid:0, or a SPIFFE ID")
	flags.StringVar(&f.req.RequestId, "request-id", "", "request id, as in errors and in the CA's log")
	flags.StringVar(&f.serial, "serial", "", "serial number of a certificate, in hexadecimal")
	flags.StringVar(&f.cert, "cert", "", "file with a certificate, PEM or DER; - for stdin")
	flags.StringVar(&f.key, "key-sha256", "", "SHA-256 of a public key (SubjectPublicKeyInfo), in hexadecimal")
	flags.StringVar(&f.req.Authority, "authority", "", "authority that signed, or that the event is about: its subject key identifier")
	flags.StringVar(&f.anomaly, "anomaly", "", "unusual by this rule: "+strings.Join(search.Anomalies, ", "))
	flags.StringVar(&f.since, "since", "", "from then on")
	flags.StringVar(&f.until, "until", "", "before then")
	flags.BoolVar(&f.oldest, "oldest-first", false, "the oldest first")
	f.c.complete(cmd, "spiffe-id", "identity")
	f.c.complete(cmd, "node", "node")
	f.c.complete(cmd, "entry", "entry")
	f.c.complete(cmd, "authority", "authority")
	fixed(cmd, "event", enumNames(ledgerv1.Event(0).Descriptor(), "EVENT_"))
	fixed(cmd, "outcome", enumNames(ledgerv1.Outcome(0).Descriptor(), "OUTCOME_"))
	fixed(cmd, "anomaly", search.Anomalies)
	return cmd
}

// fixed completes a flag from a list.
func fixed(cmd *cobra.Command, flag string, values []string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// complete completes a flag with names from the ledger.
func (c *clientFlags) complete(cmd *cobra.Command, flag, kind string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, func(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
		return c.names(cmd.Context(), kind, prefix), cobra.ShellCompDirectiveNoFileComp
	})
}

// names asks for names that begin with prefix; none if the CA does not answer soon.
func (c *clientFlags) names(ctx context.Context, kind, prefix string) []string {
	ctx, cancel := context.WithTimeout(ctx, completionDelay)
	defer cancel()
	conn, closeConn, err := c.dial(ctx)
	if err != nil {
		return nil
	}
	defer closeConn() //nolint:errcheck // the shell waits for names, not for errors
	answer, err := adminv1.NewLedgerServiceClient(conn).ListNames(ctx, &adminv1.ListNamesRequest{Kind: kind, Prefix: prefix})
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(answer.GetNames(), func(n string) bool { return n != cli.Printable(n) })
}

// request makes the request of the flags.
func (f *findFlags) request(stdin io.Reader) error {
	event, err := enumNumber(ledgerv1.Event(0).Descriptor(), "EVENT_", "event", f.event)
	if err != nil {
		return err
	}
	outcome, err := enumNumber(ledgerv1.Outcome(0).Descriptor(), "OUTCOME_", "outcome", f.outcome)
	if err != nil {
		return err
	}
	f.req.Event, f.req.Outcome, f.req.OldestFirst = ledgerv1.Event(event), ledgerv1.Outcome(outcome), f.oldest
	if f.req.Serial, err = hexFlag("serial", f.serial); err != nil {
		return err
	}
	if f.req.SpkiSha256, err = hexFlag("key-sha256", f.key); err != nil {
		return err
	}
	if f.cert != "" {
		if f.req.CertificateSha256, err = certificateHash(stdin, f.cert); err != nil {
			return err
		}
	}
	if f.anomaly != "" {
		if _, known := search.ParseAnomaly(f.anomaly); !known {
			return fmt.Errorf("--anomaly %q: write one of %s", f.anomaly, strings.Join(search.Anomalies, ", "))
		}
		f.req.Anomaly = f.anomaly
	}
	if f.req.Since, err = f.when("since", f.since); err != nil {
		return err
	}
	if f.req.Until, err = f.when("until", f.until); err != nil {
		return err
	}
	if f.req.GetSince() != nil && f.req.GetUntil() != nil && !f.req.GetSince().AsTime().Before(f.req.GetUntil().AsTime()) {
		return errors.New("--since is not before --until: nothing can be between them")
	}
	return nil
}

func (f *findFlags) run(cmd *cobra.Command) error {
	format, zone, err := f.begin()
	if err != nil {
		return err
	}
	if err := f.request(cmd.InOrStdin()); err != nil {
		return err
	}
	header := []string{"TIME", "RECORD", "EVENT", "OUTCOME", "SPIFFE ID", "NODE", "ENTRY", "SERIAL", "WHY"}
	cells := func(r *adminv1.LedgerRecord) []string { return findCells(r, zone) }
	if format == "csv" {
		header, cells = csvHeader, func(r *adminv1.LedgerRecord) []string { return csvCells(r, zone) }
	}
	rows := cli.NewRows(cmd.OutOrStdout(), format, header...)
	ask := func(ctx context.Context, client adminv1.LedgerServiceClient, p *adminv1.Page) (grpc.ServerStreamingClient[adminv1.FindResponse], error) {
		f.req.Page = p
		return client.Find(ctx, &f.req)
	}
	return list(cmd, &f.listFlags, rows, ask, func(m *adminv1.FindResponse) error {
		for _, r := range m.GetRecords() {
			if err := rows.Add(func() []string { return cells(r) }, func() ([]byte, error) { return recordJSON(r) }); err != nil {
				return err
			}
		}
		return nil
	})
}

// at shows a time.
func at(t *timestamppb.Timestamp, zone *time.Location) string {
	if t == nil {
		return ""
	}
	return t.AsTime().In(zone).Format(timeColumn)
}

// entryAt names an entry with its revision.
func entryAt(e *ledgerv1.EntryRef) string {
	if e.GetName() == "" {
		return ""
	}
	if e.GetRevision() == 0 {
		return e.GetName()
	}
	return e.GetName() + "@" + strconv.FormatUint(e.GetRevision(), 10)
}

// nodeShort is the last part of a node's SPIFFE ID.
func nodeShort(id string) string {
	if id == "" {
		return ""
	}
	return path.Base(id)
}

// about says what a record is about, where no other column does, and who asked.
func about(r *ledgerv1.Record) string {
	var words []string
	switch r.GetEvent() {
	case ledgerv1.Event_EVENT_AUTHORITY:
		a := r.GetAuthority()
		words = append(words, a.GetRole(), a.GetId(), stateText(a))
	case ledgerv1.Event_EVENT_BUNDLE:
		words = append(words, "sequence", strconv.FormatUint(r.GetBundle().GetSequence(), 10))
		for _, root := range r.GetBundle().GetRoots() {
			words = append(words, root.GetId())
		}
	case ledgerv1.Event_EVENT_SIGN_IN:
		words = append(words, r.GetSignIn().GetMethod(), "from", r.GetSignIn().GetAddress())
	case ledgerv1.Event_EVENT_QUARANTINE, ledgerv1.Event_EVENT_STORE_EDITED:
		q := r.GetQuarantine()
		switch {
		case len(q.GetKeySha256()) > 0:
			words = append(words, "key", hex.EncodeToString(q.GetKeySha256()))
		case len(q.GetSerial()) > 0:
			words = append(words, "serial", hex.EncodeToString(q.GetSerial()))
		}
		if q.GetLifted() {
			words = append(words, "lifted")
		}
	case ledgerv1.Event_EVENT_CALL_REFUSED:
		words = append(words, r.GetCall())
	default:
	}
	if a := r.GetActor(); a != "" {
		words = append(words, "by", a)
	}
	return strings.Join(words, " ")
}

// findCells is a row of the table.
func findCells(r *adminv1.LedgerRecord, zone *time.Location) []string {
	rec := r.GetRecord()
	var why []string
	for _, s := range []string{about(rec), rec.GetReason(), rec.GetDetail()} {
		if s != "" {
			why = append(why, s)
		}
	}
	text := strings.Join(why, ": ")
	if len(r.GetAnomalies()) > 0 {
		text = strings.TrimSpace(text + " [" + strings.Join(r.GetAnomalies(), " ") + "]")
	}
	return []string{
		at(rec.GetTime(), zone), strconv.FormatUint(r.GetIndex(), 10), ledger.EventName(rec.GetEvent()), ledger.OutcomeName(rec.GetOutcome()),
		rec.GetSpiffeId(), nodeShort(rec.GetNode().GetId()), entryAt(rec.GetEntry()), hex.EncodeToString(rec.GetCertificate().GetSerial()), text,
	}
}

var csvHeader = []string{
	"time", "record", "event", "outcome", "reason", "detail", "spiffe_id", "kind", "serial", "certificate_sha256", "key_sha256",
	"not_before", "not_after", "dns_names", "node", "node_address", "instance", "entry", "entry_revision", "authority", "actor",
	"verified_by", "ca_instance", "request_id", "anomalies", "leaf_hash",
}

// csvCells is a row of a CSV file, with more than fits on a screen.
func csvCells(r *adminv1.LedgerRecord, zone *time.Location) []string {
	rec := r.GetRecord()
	c := rec.GetCertificate()
	kind, revision := "", ""
	if rec.GetKind() != ledgerv1.Kind_KIND_UNSPECIFIED {
		kind = strings.ToLower(strings.TrimPrefix(rec.GetKind().String(), "KIND_"))
	}
	if rec.GetEntry() != nil {
		revision = strconv.FormatUint(rec.GetEntry().GetRevision(), 10)
	}
	return []string{
		at(rec.GetTime(), zone), strconv.FormatUint(r.GetIndex(), 10), ledger.EventName(rec.GetEvent()), ledger.OutcomeName(rec.GetOutcome()),
		rec.GetReason(), rec.GetDetail(), rec.GetSpiffeId(), kind, hex.EncodeToString(c.GetSerial()), hex.EncodeToString(c.GetSha256()),
		hex.EncodeToString(c.GetSpkiSha256()), at(c.GetNotBefore(), zone), at(c.GetNotAfter(), zone), strings.Join(c.GetDnsNames(), " "),
		rec.GetNode().GetId(), rec.GetNode().GetAddress(), rec.GetInstance(), rec.GetEntry().GetName(), revision, rec.GetAuthority().GetId(),
		rec.GetActor(), rec.GetVerifiedBy(), rec.GetCaInstance(), rec.GetRequestId(), strings.Join(r.GetAnomalies(), " "), hex.EncodeToString(r.GetHash()),
	}
}

// recordJSON is a record as `ca ledger get` shows it, with its anomalies.
func recordJSON(r *adminv1.LedgerRecord) ([]byte, error) {
	e := ledger.Entry{Index: r.GetIndex(), Record: r.GetRecord()}
	copy(e.Hash[:], r.GetHash())
	copy(e.Link[:], r.GetLink())
	line, err := ledger.FormatJSON(e)
	if err != nil || len(r.GetAnomalies()) == 0 {
		return line, err
	}
	anomalies, err := json.Marshal(r.GetAnomalies())
	return slices.Concat(line[:len(line)-1], []byte(`,"anomalies":`), anomalies, []byte("}")), err
}

// withRecord is an object with some fields before a record.
func withRecord(r *adminv1.LedgerRecord, fields any) ([]byte, error) {
	head, err := json.Marshal(fields)
	if err != nil {
		return nil, err
	}
	line, err := recordJSON(r)
	return slices.Concat(head[:len(head)-1], []byte(`,"issued":`), line, []byte("}")), err
}
