package kube

import "time"

// Object is what every object of the API has; a struct for a kind of objects embeds
// it. It leaves out what is large and of no use here, such as who manages which field:
// whoever changes an object uses Apply or Merge, and never sends back what was read.
type Object struct {
	APIVersion string `json:"apiVersion,omitempty"`
	Kind       string `json:"kind,omitempty"`
	Metadata   Meta   `json:"metadata"`
}

// Meta is an object's metadata.
type Meta struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	// UID is never used again, unlike a name.
	UID             string            `json:"uid,omitempty"`
	ResourceVersion string            `json:"resourceVersion,omitempty"`
	Generation      int64             `json:"generation,omitempty"`
	Labels          map[string]string `json:"labels,omitempty"`
	Annotations     map[string]string `json:"annotations,omitempty"`
	// CreationTimestamp is set by the server.
	CreationTimestamp *time.Time `json:"creationTimestamp,omitempty"`
	// DeletionTimestamp is when the grace of an object that is being deleted ends.
	DeletionTimestamp *time.Time `json:"deletionTimestamp,omitempty"`
	OwnerReferences   []Owner    `json:"ownerReferences,omitempty"`
}

// Owner is an object that another one belongs to.
type Owner struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Name       string `json:"name"`
	UID        string `json:"uid"`
	// Controller: the owner made the object and looks after it; at most one does.
	Controller bool `json:"controller,omitempty"`
}

// Condition is one of those by which an object's status says what has become of it.
type Condition struct {
	Type    string `json:"type"`
	Status  string `json:"status"` // "True", "False" or "Unknown"
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// SameSpec says whether two states of an object differ at most in what its controllers
// write into its status.
func (m *Meta) SameSpec(o *Meta) bool {
	return m.UID == o.UID && m.Generation == o.Generation && (m.DeletionTimestamp == nil) == (o.DeletionTimestamp == nil)
}

func (o *Object) object() *Object { return o }

// object is a pointer to a struct T that embeds Object.
type object[T any] interface {
	*T
	object() *Object
}
