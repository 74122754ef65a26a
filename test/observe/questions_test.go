package observe

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// question is how a command of docs/audit.md is called in the test, and what answers.
type question struct {
	args []string
	// want is in what it prints; without, it only has to succeed.
	want string
}

// Every command of the table "Nine questions" is asked of a CA that has been in use,
// and its answer is right. No command of the page is left out, and none is made up.
func TestNineQuestions(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	config := filepath.Join(ca.Dir, "ca.yaml")
	agent := ca.StartAgent(t, "web-1", local.AgentOptions{})
	const id = "spiffe://example.org/shop/orders"
	entry := func(uid int) string {
		return fmt.Sprintf("- {name: shop, spiffe_id: %s, workloads: unix.uid == %d, ttl: 1h, accept_weak: true}\n", id, uid)
	}
	ca.Apply(t, entry(4711))
	ca.Apply(t, entry(0)) // which newly allows what comes
	kept := filepath.Join(ca.Dir, "checkpoint-of-monday")
	local.Await(t, "keep a checkpoint", func(context.Context) error {
		b, err := os.ReadFile(filepath.Join(ca.DataDir, "tree", "checkpoint"))
		if err == nil {
			err = os.WriteFile(kept, b, 0o600)
		}
		return err
	})
	svid := filepath.Join(ca.Dir, "svid")
	local.Await(t, "fetch an X.509-SVID", func(ctx context.Context) error {
		out, err := exec.CommandContext(ctx, filepath.Join(local.Binaries(t), "node-agent"), "fetch", "--socket", agent.Address(), "--write", svid).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	seen := filepath.Join(svid, "svid.pem")
	type certificate struct {
		Serial     string `json:"serial"`
		SPKISHA256 string `json:"spki_sha256"`
	}
	var issued struct {
		Index  uint64 `json:"index"`
		Record struct {
			Certificate certificate `json:"certificate"`
			RequestID   string      `json:"request_id"`
			Authority   authority   `json:"authority"`
			Entry       struct {
				Revision uint64 `json:"revision"`
			} `json:"entry"`
		} `json:"record"`
	}
	local.Await(t, "find it in the index, under a checkpoint", func(context.Context) error {
		out, err := ca.Command(t, "ledger", "find", "--cert", seen, "-o", "jsonl")
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &issued); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		_, err = ca.Command(t, "ledger", "prove", "--config", config, "--index", fmt.Sprint(issued.Index), "-o", filepath.Join(ca.Dir, "any.tlog-proof"))
		return err
	})
	record := issued.Record
	serial := record.Certificate.Serial
	known := authorities(t, ca)
	root := known[slices.IndexFunc(known, func(a authority) bool { return a.Role == "root" })].ID
	hour := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	proof := filepath.Join(ca.Dir, "svid.tlog-proof")
	vkey := strings.TrimSpace(ca.MustCommand(t, "ledger", "key", "--config", config))

	questions := map[string]question{
		"ca who spiffe://example.org/shop/orders":                    {[]string{"who", id}, `shop/orders +web-1 .*current +` + serial},
		"ca who spiffe://example.org/shop/orders --at":               {[]string{"who", id, "--at", hour[:len("2006-01-02T15")] + ":00:00Z"}, ""},
		"ca ledger why SERIAL":                                       {[]string{"ledger", "why", serial, "--config", config}, `same verdict`},
		"ca ledger find --node N --since T1 --until T2 --all -o csv": {[]string{"ledger", "find", "--node", "web-1", "--since", "1h", "--until", hour, "--all", "-o", "csv"}, `,issue,success,.*shop/orders`},
		"ca ledger newly-allowed --entry shop --revision 17":         {[]string{"ledger", "newly-allowed", "--entry", "shop", "--revision", fmt.Sprint(record.Entry.Revision)}, `shop/orders +web-1 .*unix.uid == 4711`},
		"ca ledger first-seen --since 7d":                            {[]string{"ledger", "first-seen", "--since", "7d"}, `shop/orders +web-1 +yes`},
		"ca ledger first-seen --node web-1":                          {[]string{"ledger", "first-seen", "--node", "web-1"}, `shop/orders +web-1 +yes`},
		"ca ledger find --anomaly image_digest_change":               {[]string{"ledger", "find", "--anomaly", "image_digest_change"}, ""},
		"ca ledger overdue":                                          {[]string{"ledger", "overdue"}, ""},
		"ca ledger verify --checkpoint FILE":                         {[]string{"ledger", "verify", "--config", config, "--checkpoint", kept}, `has the same [0-9]+ records, root [0-9a-f]{64}, signed`},
		"ca ledger prove --cert seen.pem":                            {[]string{"ledger", "prove", "--config", config, "--cert", seen}, `(?s)c2sp.org/tlog-proof.*index ` + fmt.Sprint(issued.Index)},
		"ca ledger find --actor uid:0":                               {[]string{"ledger", "find", "--actor", "uid:0"}, `entry_applied +success`},
		"ca who --root ID":                                           {[]string{"who", "--root", root}, `shop/orders +web-1 .*current`},
		"ca authority show":                                          {[]string{"authority", "show"}, root[:8]},
		"ca who --node web-1":                                        {[]string{"who", "--node", "web-1"}, `shop/orders +web-1`},
		"ca ledger find --node web-1 --since '2026-11-23 02:00' --until '2026-11-23 05:30' --all -o csv": {[]string{"ledger", "find", "--node", "web-1", "--since", "2026-11-23 02:00", "--until", hour, "--all", "-o", "csv"}, `issue,success`},
		"ca ledger find --cert seen.pem":                     {[]string{"ledger", "find", "--cert", seen}, serial},
		"ca ledger find --serial":                            {[]string{"ledger", "find", "--serial", serial}, serial},
		"ca ledger find --key-sha256":                        {[]string{"ledger", "find", "--key-sha256", record.Certificate.SPKISHA256}, serial},
		"ca ledger find --request-id":                        {[]string{"ledger", "find", "--request-id", record.RequestID}, serial},
		"ca ledger find --outcome refused --since 24h":       {[]string{"ledger", "find", "--outcome", "refused", "--since", "24h"}, ""},
		"ca ledger find --event entry_applied":               {[]string{"ledger", "find", "--event", "entry_applied"}, `shop`},
		"ca ledger find --anomaly key_reuse":                 {[]string{"ledger", "find", "--anomaly", "key_reuse"}, ""},
		"ca ledger find --event authority":                   {[]string{"ledger", "find", "--event", "authority"}, record.Authority.ID[:8]},
		"ca ledger find --event bundle":                      {[]string{"ledger", "find", "--event", "bundle"}, `bundle +success`},
		"ca ledger find --event token_created":               {[]string{"ledger", "find", "--event", "token_created"}, `uid:0`},
		"ca who --entry shop":                                {[]string{"who", "--entry", "shop"}, `shop/orders`},
		"ca who --authority 0a1b2c3d":                        {[]string{"who", "--authority", record.Authority.ID[:8]}, `shop/orders`},
		"ca who --root 5f5e5d5c":                             {[]string{"who", "--root", root[:8]}, `shop/orders`},
		"ca ledger prove --cert svid.pem -o svid.tlog-proof": {[]string{"ledger", "prove", "--config", config, "--cert", seen, "-o", proof}, ""},
		"ca ledger verify":                                   {[]string{"ledger", "verify", "--config", config}, `are intact`},
		"ca ledger verify --checkpoint checkpoint-of-monday": {[]string{"ledger", "verify", "--config", config, "--checkpoint", kept}, `are intact`},
		"ca ledger consistency OLD NEW":                      {[]string{"ledger", "consistency", "--config", config, kept, filepath.Join(ca.DataDir, "tree", "checkpoint")}, `continues that of`},
	}
	// In this order, since they change something, or need what others made.
	last := []string{`ca ledger verify --proof svid.tlog-proof --cert svid.pem --key "$VKEY"`, "ca node ban N"}
	questions[last[0]] = question{[]string{"ledger", "verify", "--proof", proof, "--cert", seen, "--key", vkey}, `record [0-9]+ is in the log`}
	questions[last[1]] = question{[]string{"node", "ban", "web-1", "--reason", "stolen"}, ""}

	asked := documented(t)
	for _, text := range asked {
		if _, ok := questions[text]; !ok {
			t.Errorf("docs/audit.md has a command that is not tried: %s", text)
		}
	}
	for text := range questions {
		if !slices.Contains(asked, text) {
			t.Errorf("docs/audit.md does not have the command %s", text)
		}
	}
	try := func(text string) {
		t.Helper()
		q := questions[text]
		out, err := ca.Command(t, q.args...)
		if err != nil {
			t.Errorf("%s: %v", text, err)
		} else if !regexp.MustCompile(q.want).MatchString(out) {
			t.Errorf("%s: want %q in\n%s", text, q.want, out)
		}
	}
	for text := range questions {
		if !slices.Contains(last, text) {
			try(text)
		}
	}
	for _, text := range last {
		try(text)
	}
	// What is to be withdrawn is, as the same question says.
	local.Await(t, "see the certificates of the banned node withdrawn", func(context.Context) error {
		out, err := ca.Command(t, "who", id)
		if err == nil && !strings.Contains(out, "withdrawn") {
			err = fmt.Errorf("who says %s", out)
		}
		return err
	})
}

// authority is what JSON says of one.
type authority struct {
	ID   string `json:"id"`
	Role string `json:"role"`
}

// authorities are those of a CA.
func authorities(t *testing.T, ca *local.CA) []authority {
	t.Helper()
	var list struct {
		Authorities []authority `json:"authorities"`
	}
	if err := json.Unmarshal([]byte(ca.MustCommand(t, "authority", "list", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	return list.Authorities
}

// documented are the commands in the tables of questions of docs/audit.md. A flag by
// itself belongs to the command before it, in the place of that one's own flags; a
// word by itself is another value of its last flag.
func documented(t *testing.T) []string {
	t.Helper()
	var all []string
	for line := range strings.Lines(string(read(t, filepath.Join(require.Repository(), "docs", "audit.md")))) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		last := strings.TrimSpace(cells[len(cells)-1])
		if !strings.HasPrefix(line, "|") || !strings.HasPrefix(last, "`ca ") {
			continue
		}
		command := ""
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(last, -1) {
			text := m[1]
			switch words := strings.Fields(command); {
			case strings.HasPrefix(text, "ca "):
				command = text
			case strings.HasPrefix(text, "--"):
				name := slices.IndexFunc(words, func(w string) bool { return strings.HasPrefix(w, "-") })
				if name < 0 {
					name = len(words)
				}
				flag, _, _ := strings.Cut(text, " ")
				if flag == "--at" { // a time of this page is another day
					text = flag
				}
				if text == "--dir" || text == "--key" { // of a copied folder, as the auditor's pages show
					continue
				}
				command = strings.Join(append(slices.Clone(words[:name]), text), " ")
			case len(words) > 1 && words[len(words)-2] == "--event":
				command = strings.Join(append(slices.Clone(words[:len(words)-1]), text), " ")
			default:
				continue
			}
			if !slices.Contains(all, command) {
				all = append(all, command)
			}
		}
	}
	if len(all) < 20 {
		t.Fatalf("docs/audit.md has only these commands: %q", all)
	}
	return all
}
