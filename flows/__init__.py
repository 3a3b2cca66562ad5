"""The flow that joins the DVC stages. It knows stage names and statuses only, never tensors."""
