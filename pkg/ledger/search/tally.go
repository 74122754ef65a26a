package search

import (
	"errors"
	"time"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// ErrNoRoot says that no root has, or had, a name, or that several have.
var ErrNoRoot = errors.New("no root of that name")

// ErrNoRecord is wrapped by the error about a record that is not in the search
// index: there is none, or not yet, or it was archived.
var ErrNoRecord = errors.New("there is no such record in the search index")

// TallyAge is how long tallies are kept.
const TallyAge = 35 * 24 * time.Hour

// Tally is how many decisions of one kind there were in the time from Start on.
type Tally struct {
	Start   time.Time
	Event   ledgerv1.Event
	Outcome ledgerv1.Outcome
	Reason  string
	Total   uint64
}

// EntryTally is how often an entry decided about an X.509-SVID.
type EntryTally struct {
	Entry           string
	Issued, Refused uint64
	// Last is when an X.509-SVID was issued by it last; zero if none was.
	Last time.Time
}

// Identity is one SPIFFE ID with X.509-SVIDs that are valid and in use.
type Identity struct {
	SPIFFEID string
	// Certificates and the Nodes that have them; Overdue are those of them that
	// should have been replaced by now.
	Certificates, Nodes, Overdue uint64
	// First and Last are when the first and the last of them expires.
	First, Last time.Time
}

// Horizon is when X.509-SVIDs that are valid and in use expire.
type Horizon struct {
	// Expiring are their numbers in each step of time from now on.
	Expiring []uint64
	// Active are all of them; Overdue should have been replaced by now.
	Active, Overdue uint64
}
